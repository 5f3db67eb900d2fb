"""How new weights reach a server: one small interface, one class a way, in the folder of the engine it is for.

After every update, before an answer counts, the server is asked for the log-probs of the version's probe, and these are
compared with the trainer's: a server may say that it serves a version and sample from something else (a head that was
not updated, experts in another layout). A server that differs (probe_gap.py) is paused, and named with the figures.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from mgrpo.engines.client import ServerClient
from mgrpo.engines.labels import Label, label_of
from mgrpo.engines.probe_gap import TOLERANCE, Gap
from mgrpo.engines.weight_folder import WeightFolder
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.types import Probe
from mgrpo.weights.version import Weights

C = TypeVar("C", bound=ServerClient)

PROBES = 64  # versions whose probe is remembered


class Unconfirmed(InfrastructureError):
    """An answer of weights that nobody has compared, or can compare any more."""


class WeightSync(ABC, Generic[C]):
    """Brings versions to servers of one policy. `prepare` comes once a version, `ensure_version` once a server and
    version."""

    labels_tokens = True
    """The server itself reports which weights sampled which token; false where a request names its weights."""
    takes_patches = False
    """prepare() takes what changed since another version."""
    tolerance = TOLERANCE["bfloat16"]
    """Nats that a server may be off; see Gap.within."""
    stopped = "it is paused"
    """What stop() has done, in words."""
    wrong_hint = ""
    """What to do about a server whose weights are wrong."""

    def __init__(self, folder: Path, timeout: float) -> None:
        """folder: shared with the servers and with the other workers, which lock each server through it. timeout:
        seconds that one step of an update may take."""
        self.folder, self.timeout = WeightFolder(folder), timeout
        self.role = ""  # of the version prepared last
        self.on_event: Callable[[str], None] = lambda line: None
        """Takes a line for people, e.g. about a patch that a server refused."""
        self._probes: dict[Label, Probe] = {}
        self._right: dict[str, set[Label]] = {}  # url -> versions that it was found to serve

    def own(self, label: Label | None) -> Label | None:
        """`label`, unless it is that of another role."""
        return label if label is not None and label.role == self.role else None

    async def prepare(self, weights: Weights) -> Label:
        """Make a version ready for update(). Idempotent, also between workers. Raises ValueError when it does not
        fit, ConfigError for a label that is none, CorruptionError where it changes a version that is not here."""
        label = label_of(weights)
        self.role = label.role
        await self._prepare(label, weights)
        if weights.probe is not None and label not in self._probes:
            self._probes[label] = weights.probe
            if len(self._probes) > PROBES:
                del self._probes[next(iter(self._probes))]
            await asyncio.to_thread(self.folder.write_probe, label, weights.probe)
        return label

    @abstractmethod
    async def _prepare(self, label: Label, weights: Weights) -> None:
        """See prepare()."""

    @abstractmethod
    async def current_version(self, server: C) -> Label | None:
        """The newest version that the server has; None before the first."""

    @abstractmethod
    async def paused(self, server: C) -> bool:
        """An update of the server is under way, or was never ended."""

    @abstractmethod
    async def update(self, server: C, label: Label) -> None:
        """Make the server serve the prepared version. Raises InfrastructureError naming server and step."""

    async def stop(self, server: C) -> None:
        """Make the wrong weights answer nobody: pause the server, as an update that was never ended does."""

    async def repair(self, server: C, label: Label) -> bool:
        """Bring a version in another way to a server that has taken it and is wrong; False where there is none."""
        return False

    def model_name(self, served: str, label: Label) -> str:
        """The name to ask for, of a server whose model is called `served`."""
        return served

    async def ensure_version(self, server: C, label: Label) -> Label:
        """The version that the server serves afterwards: `label`, or a newer one from another worker. One worker at a
        time: two updates at once would resume each other's half-read weights. Raises ConfigError where the server then
        answers with other weights than the trainer's."""
        async with self.folder.lock(server.url, 4 * self.timeout):
            current = await self.current_version(server)
            if current is None or current < label or await self.paused(server):
                self.forget(server)
                self.folder.note(label, server.url, right=False)
                await self.update(server, label)
                current = await self.current_version(server)
            if current is None or current < label:
                raise InfrastructureError(f"{server.url}: serves {current} after an update to {label}")
            await self.compare(server, current)
        return current

    # -- right or wrong --------------------------------------------------------------------------------------------

    async def confirm(self, server: C, label: Label) -> None:
        """Return once the server's weights of this version are known to be right. Raises Unconfirmed where it serves
        another one by now and nobody has compared this one, ConfigError where they are wrong."""
        if self._is_right(server, label):
            return
        async with self.folder.lock(server.url, 4 * self.timeout):
            if self._is_right(server, label):
                return
            if await self.paused(server) or await self.current_version(server) != label:
                raise Unconfirmed(f"{server.url}: weights {label} were replaced before they were compared")
            await self.compare(server, label)

    def forget(self, server: C) -> None:
        """It may be another server under the same address: only what other workers have noted of it counts."""
        self._right.pop(server.url, None)

    def _is_right(self, server: C, label: Label) -> bool:
        if label in self._right.get(server.url, ()):
            return True
        if self.folder.is_right(label, server.url):
            self._right.setdefault(server.url, set()).add(label)
            return True
        return False

    async def compare(self, server: C, label: Label) -> None:
        """The server, which serves this version, with the trainer's probe of it; under the server's lock. Raises
        ConfigError."""
        probe = self._probes.get(label) or self.folder.probe(label)
        if probe is not None and not self._is_right(server, label):
            gap = await self._gap(server, label, probe)
            if not gap.within(self.tolerance) and await self.repair(server, label):
                gap = await self._gap(server, label, probe)
            if not gap.within(self.tolerance):
                await self.stop(server)
                hint = f"; {self.wrong_hint}" if self.wrong_hint else ""
                raise ConfigError(
                    f"{server.url}: answers with other weights than those of {label} under its name: "
                    f"{gap.words(self.tolerance)}; {self.stopped}{hint}"
                )
        self.folder.note(label, server.url, right=True)
        self._right.setdefault(server.url, set()).add(label)

    async def _gap(self, server: C, label: Label, probe: Probe) -> Gap:
        name = self.model_name((await server.info()).model, label)
        return Gap.between(await server.prompt_logprobs(name, probe.token_ids), probe)


class FolderSync(WeightSync[C]):
    """Whole weights through a folder, one model.safetensors a version; what comes as a patch is made whole there."""

    takes_patches = True

    async def _prepare(self, label: Label, weights: Weights) -> None:
        await asyncio.to_thread(self.folder.add, weights)
        await asyncio.to_thread(self.folder.make_whole, label)
