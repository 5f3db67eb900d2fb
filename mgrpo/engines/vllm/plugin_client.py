"""Calls of our plug-in in a server (plugin/loading.py), through /collective_rpc."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from mgrpo.engines.client import ServerDown
from mgrpo.engines.labels import Label
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.errors import CorruptionError, InfrastructureError

if TYPE_CHECKING:
    from mgrpo.engines.weight_folder import PatchFile, WeightFolder

EXTENSION = "mgrpo.engines.vllm.plugin.extension.WorkerExtension"
ATTEMPTS = 3  # of a healthy server, before it counts as one without the plug-in
AGAIN_SECONDS = 1.0  # a front end notices the death of its engine within that
T = TypeVar("T")


class NoPluginError(InfrastructureError):
    """The server was started without the plug-in."""


async def first_answer(server: VllmClient, ask: Callable[[], Awaitable[T]]) -> T:
    """The answer of `ask`, the call that tells whether a server has the plug-in. Raises NoPluginError where it has not.
    vLLM 0.32 answers status 500 where a method is missing, and where a worker has just been killed as well: the former
    again and again, from a server that is healthy."""
    missing = f"{server.url} has no plug-in of mgrpo; start it with --worker-extension-cls {EXTENSION}"
    if server.plugin is False:
        raise NoPluginError(missing)
    attempts = 0
    while True:
        attempts += 1
        try:
            answer = await ask()
        except ServerDown:
            raise
        except InfrastructureError as error:
            if "status 500" not in str(error) or server.plugin:
                raise
            await server.healthy()
            if attempts == ATTEMPTS:
                server.plugin = False
                raise NoPluginError(missing) from error
            await asyncio.sleep(AGAIN_SECONDS)
        else:
            server.plugin = True
            return answer


async def held_version(server: VllmClient) -> str:
    """Label of the version that all its workers hold through the plug-in; "" where there is none. Raises
    NoPluginError."""
    answers = await first_answer(server, lambda: _call(server, "mgrpo_info", {}, server.timeout))
    held = {str(answer["label"]) for answer in answers}
    return held.pop() if len(held) == 1 else ""


async def load_whole(server: VllmClient, folder: WeightFolder, label: Label, timeout: float) -> None:
    """A whole version, of the folder, into a paused server. Raises InfrastructureError naming what it refused,
    CorruptionError where the file has been damaged since it was written."""
    arguments = {"file": str(folder.whole(label).resolve()), "label": str(label)}
    if error := _error(await _call(server, "mgrpo_load", arguments, timeout)):
        damaged = await asyncio.to_thread(folder.drop_damaged, label)
        raise (CorruptionError if damaged else InfrastructureError)(
            f"{server.url}: refused weights {label}: {error}"
        )


async def load_patch(server: VllmClient, patch: PatchFile, timeout: float) -> str:
    """A patch into a paused server; what it refused, or ""."""
    known = {"base": patch.base, "label": patch.label, "size": patch.size, "crc": patch.crc}
    arguments = {"file": str(patch.path.resolve()), **known}
    return _error(await _call(server, "mgrpo_patch", arguments, timeout))


def _error(answers: list[dict[str, object]]) -> str:
    return next((str(answer["error"]) for answer in answers if answer["error"]), "")


async def _call(
    server: VllmClient, method: str, arguments: Mapping[str, object], timeout: float
) -> list[dict[str, object]]:
    """The answer of each of the server's workers."""
    body = {"method": method, "kwargs": dict(arguments), "timeout": timeout}
    answer = await server.post("/collective_rpc", body)
    results = answer.get("results") if isinstance(answer, dict) else None
    if not results or not all(isinstance(one, dict) and {"label", "error"} <= one.keys() for one in results):
        raise InfrastructureError(f"{server.url}: an answer to {method} that is none: {str(answer)[:80]}")
    return list(results)
