"""What a client knows of its connection: libzmq shows handshakes and their failures on a monitor socket only."""

from __future__ import annotations

import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from mgrpo.transport.address import Socket

AUTH_GRACE_S = 1.2  # connections that open and close without a handshake for this long are a refusal

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


class Connection:
    """State of one socket's connection, for the thread that owns the socket. inproc sockets have no connection events:
    they count as connected."""

    def __init__(self, socket: Socket, scheme: str, secured: bool) -> None:
        self._socket, self._secured = socket, secured
        self.watched = scheme != "inproc"
        self.monitor: Socket | None = socket.get_monitor_socket(_EVENTS) if self.watched else None
        self.connected = not self.watched
        self._refused: str | None = None
        self._suspect = 0.0  # when handshakes began to fail
        self._proven = False  # one has succeeded: later failures are faults of the network, not of the keys

    def read(self) -> bool:
        """Take in what has happened; whether a connection was made, on which everything is to be sent again."""
        made = False
        while self.monitor is not None and self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self._proven, self._suspect, self._refused = True, True, 0.0, None
                made = True
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refused = "refused our key (not in its allow-list)"
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._refused = "one side is encrypted and the other is not"
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._suspect = self._suspect or time.monotonic()
            elif event == zmq.EVENT_DISCONNECTED:
                self.connected = False
        return made

    def refusal(self, now: float) -> str | None:
        """Why the peer will never take this connection, or None while it may."""
        if self._suspect and not self._proven and now - self._suspect > AUTH_GRACE_S:
            what = (
                "wrong server key, or the server is not encrypted"
                if self._secured
                else "the server is encrypted"
            )
            self._refused = self._refused or f"closes every connection during the handshake ({what}?)"
        return self._refused

    def close(self) -> None:
        """The socket itself is its owner's to close, afterwards."""
        if self.monitor is not None:
            self._socket.disable_monitor()
            self.monitor.close(linger=0)
