"""CURVE keys: who may connect, and as what.

    keys/server.secret      0600  the server's key pair; stays on the server
    keys/allowed/NAME.pub   0644  public key and role of a peer that may connect; read again whenever it
    changes NAME.key                0600  a peer's key pair, its role and the server's public key; goes to the
    peer

A peer's role comes from its public key, never from what it says. pyzmq's own helper writes secrets with mode
0644; here a secret file is created with 0600 and refused when others can read it.
"""

from __future__ import annotations

import os
import re
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from mgrpo.addresses import Addresses
from mgrpo.errors import ConfigError
from mgrpo.files import sync_folder, write_atomic
from mgrpo.transport.address import Socket
from mgrpo.transport.codec import Refusal

DOMAIN = "mgrpo"
LOOK_S = 0.2  # how soon a change of the allow-list is noticed
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROLE = re.compile(r"worker|launcher|observer|trainer:[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """A peer's side of the encryption: pass it as `key=` to connect()."""

    public: bytes
    secret: bytes
    server: bytes
    role: str

    @staticmethod
    def load(path: str | Path) -> ClientKeys:
        """Read NAME.key; raises ConfigError naming what is wrong with it."""
        values = _read(Path(path), ("public", "secret", "server", "role"), private=True)
        return ClientKeys(
            values["public"].encode(), values["secret"].encode(), values["server"].encode(), values["role"]
        )

    def attach(self, socket: Socket) -> None:
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        socket.curve_serverkey = self.server


class ServerKeys:
    """A server's side: its own key pair and the allow-list. One object serves one server."""

    def __init__(self, folder: str | Path) -> None:
        """Read folder/server.secret; raises ConfigError when there is none or others can read it."""
        self._folder = Path(folder)
        values = _read(self._folder / "server.secret", ("public", "secret"), private=True)
        self.public, self._secret = values["public"].encode(), values["secret"].encode()
        self._authenticator: ThreadAuthenticator | None = None
        self._roles: dict[str, str] = {}
        self._stamp: object = None
        self._looked = -LOOK_S

    def attach(self, context: zmq.Context[Socket], socket: Socket) -> None:
        """Encrypt a server's socket; its context must be its own."""
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain=DOMAIN, credentials_provider=self)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public, self._secret
        socket.zap_domain = DOMAIN.encode()

    def detach(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    def callback(self, domain: str, key: bytes) -> bool:
        """For the authenticator: may this public key connect?"""
        return key.decode() in self.roles()

    def user_of(self, frame: zmq.Frame) -> str:
        """The public key behind a received frame."""
        return str(frame.get("User-Id"))

    def check_role(self, user: str, role: str) -> None:
        """Raise FORBIDDEN unless the key `user` is listed, now, with this role."""
        known = self.roles().get(user)
        if known is None:
            raise Refusal("FORBIDDEN", "this key is not in the allow-list any more")
        if known != role:
            raise Refusal("FORBIDDEN", f"this key is that of a {known}, not of a {role or 'nobody'}")

    def roles(self) -> dict[str, str]:
        """Public key -> role, read again when a file of the allow-list has changed."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return self._roles
        self._looked = now
        allowed = self._folder / "allowed"
        try:
            stamp = tuple(sorted((e.name, e.stat().st_mtime_ns) for e in os.scandir(allowed)))
        except OSError:
            self._roles, self._stamp = {}, None
            return {}
        if stamp != self._stamp:
            files = [allowed / name for name, _ in stamp if name.endswith(".pub")]
            read = [_read(file, ("public", "role"), private=False) for file in files]
            self._roles, self._stamp = {values["public"]: values["role"] for values in read}, stamp
        return self._roles


def server_keys(addresses: Addresses) -> ServerKeys | None:
    """What a server of the run encrypts with; None for plain links."""
    return ServerKeys(addresses.keys) if addresses.keys is not None else None


def client_keys(addresses: Addresses, name: str) -> ClientKeys | None:
    """The keys of the part `name` of the run (launcher, worker, a role); None for plain links."""
    return ClientKeys.load(addresses.keys / f"{name}.key") if addresses.keys is not None else None


def init_keys(folder: str | Path) -> Path:
    """Make a server's key pair in a new folder; returns the secret file. Raises ConfigError when there is one."""
    folder = Path(folder)
    try:
        (folder / "allowed").mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        sync_folder(folder)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}") from None
    public, secret = zmq.curve_keypair()
    path = folder / "server.secret"
    _write(path, {"public": public.decode(), "secret": secret.decode()}, 0o600)
    return path


def add_key(folder: str | Path, name: str, role: str, out: str | Path | None = None) -> Path:
    """Allow a new peer; returns its key file (out, or folder/NAME.key), which is to be moved to the peer."""
    folder = Path(folder)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {name!r}: expected letters, digits, dots, dashes and underscores, 64 at most"
        )
    if not _ROLE.fullmatch(role):
        raise ConfigError(f"role {role!r}: expected worker, launcher, observer or trainer:AGENT")
    server = _read(folder / "server.secret", ("public",), private=True)["public"]
    public, secret = (key.decode() for key in zmq.curve_keypair())
    path = Path(out) if out is not None else folder / f"{name}.key"
    _write(path, {"role": role, "public": public, "secret": secret, "server": server}, 0o600)
    _write(folder / "allowed" / f"{name}.pub", {"role": role, "public": public}, 0o644)
    return path


def _write(path: Path, values: dict[str, str], mode: int) -> None:
    """A new file with its final mode from the first byte on. Keys are Z85: they hold no quote and no
    backslash."""
    text = "".join(f"{name} = '{value}'\n" for name, value in values.items())
    if path.exists():
        raise ConfigError(f"{path} exists")
    try:
        write_atomic(path, text, mode)  # the allow-list is read while it changes
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _read(path: Path, names: tuple[str, ...], private: bool) -> dict[str, str]:
    try:
        if private and path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others: chmod 600 {path}")
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read key file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a key file: {error}") from None
    for name in names:
        value = values.get(name)
        if not isinstance(value, str) or (name != "role" and len(value) != 40):
            raise ConfigError(f"{path} is not a key file: no valid {name!r}")
    return {name: values[name] for name in names}
