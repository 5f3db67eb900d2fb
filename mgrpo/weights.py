"""Weight sync over the link: a trainer serves its newest weights, an engine fetches what it has not got.

One request, `weights.get {have, wait_s}`, answered with the label of the newest version as soon as it differs from
`have`, and the weights in safetensors format, cut into frames. The bytes are made once a version, not once a request.
A worker on another server asks once for the policy's shell (configuration and tokenizer) and builds its model from it.
Labels are `e<epoch>.v<version>`: after a rollback the same version number may name other weights.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from mgrpo.errors import DeadlineError
from mgrpo.transport.client import Client
from mgrpo.transport.codec import Name, Signed
from mgrpo.transport.server import Handler, Park, Reply, Request

FRAME_BYTES = 8 << 20  # well below the largest frame a peer accepts


class GetWeights(msgspec.Struct, array_like=True, frozen=True):
    """have: label of the weights the asker holds ("" for none). at_least: a version that would be of use to it."""

    have: Name = ""
    at_least: Signed = 0
    wait_s: float = 0.0


class WeightsAre(msgspec.Struct, array_like=True, frozen=True):
    """The newest version. Frames follow unless it is the one the asker has, or the wait was in vain."""

    label: Name
    version: Signed


@dataclass(frozen=True, slots=True)
class Weights:
    """A version's label, number and safetensors bytes."""

    label: str
    version: int
    data: bytes


class GetShell(msgspec.Struct, array_like=True, frozen=True):
    wait_s: float = 0.0


class WeightsServer:
    """The trainer's side: `publish` replaces what the handlers serve. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: Weights | None = None
        self._shell: dict[str, bytes] | None = None

    def describe(self, shell: dict[str, bytes]) -> None:
        """The policy's files without weights, as of shell_files."""
        with self._lock:
            self._shell = shell

    def publish(self, weights: Weights) -> None:
        with self._lock:
            self._current = weights

    def handlers(self) -> Mapping[str, Handler]:
        """What an endpoint needs to serve the weights."""
        return {"weights.get": self._get, "weights.shell": self._get_shell}

    def _get_shell(self, request: Request) -> Reply | Park:
        def poll() -> Reply | None:
            with self._lock:
                shell = self._shell
            return None if shell is None else Reply(list(shell), list(shell.values()))

        return poll() or Park(poll, request.decode(GetShell).wait_s, Reply([]))

    def _get(self, request: Request) -> Reply | Park:
        wanted = request.decode(GetWeights)

        def poll() -> Reply | None:
            with self._lock:
                current = self._current
            if current is None or current.version < wanted.at_least:
                return None
            if current.label == wanted.have:
                return Reply(WeightsAre(current.label, current.version))
            view = memoryview(current.data)
            frames = [view[i : i + FRAME_BYTES] for i in range(0, len(view), FRAME_BYTES)]
            return Reply(WeightsAre(current.label, current.version), frames)

        return poll() or Park(poll, wanted.wait_s, Reply(WeightsAre("", -1)))


def fetch_weights(client: Client, have: str, at_least: int, wait_s: float) -> Weights | None:
    """The newest weights that the trainer behind `client` serves, once their version is at least `at_least`; None when
    they are those labelled `have`. Raises DeadlineError naming the trainer when there are none within wait_s."""
    request = GetWeights(have, at_least, wait_s)
    answer = client.call("weights.get", request, timeout=wait_s + 5.0, step=at_least)
    newest = answer.decode(WeightsAre)
    if newest.version < 0:
        raise DeadlineError(
            f"{client.peer} at {client.url} had no weights of version {at_least} within {wait_s:g} s"
        )
    if newest.label == have:
        return None
    return Weights(newest.label, newest.version, b"".join(answer.frames))


def fetch_shell(client: Client, wait_s: float) -> dict[str, bytes]:
    """The policy's files without weights; {} when the trainer had none within wait_s."""
    answer = client.call("weights.shell", GetShell(wait_s), timeout=wait_s + 5.0)
    return dict(zip(answer.decode(list), map(bytes, answer.frames), strict=True))
