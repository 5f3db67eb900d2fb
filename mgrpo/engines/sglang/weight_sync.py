"""How new weights reach an SGLang server: through a safetensors folder that it reads again.

NOT RUN against a real server; see client.py.

    /pause_generation mode=abort -> /update_weight_version "updating:<label>" -> /update_weights_from_disk
    -> /flush_cache -> /continue_generation -> /update_weight_version "<label>" -> /get_model_info equals the label

- abort, not retract or in_place: SGLang reports one version for a whole answer, that of its end, so an answer across an
  update would label its older tokens with the newer version. Aborted answers return with their tokens so far under the
  older label, before the pause is over; their clients continue them once the server does. Draining instead would wait
  for the longest generation.
- SGLang has no route that reports a pause, so the label does: a worker that dies in the middle leaves a label that
  begins with "updating:", which makes the next worker update the server again, also where it died just before or after
  /continue_generation. Whatever is sampled under such a label is of the new weights: an update that fails leaves the
  server paused.
"""

from __future__ import annotations

from mgrpo.engines.labels import Label, parse_label
from mgrpo.engines.sglang.client import UPDATING, SglangClient
from mgrpo.engines.weight_sync import FolderSync
from mgrpo.errors import InfrastructureError


class SglangFolderSync(FolderSync[SglangClient]):
    """Whole weights through a folder (see the module's docstring)."""

    async def current_version(self, server: SglangClient) -> Label | None:
        return self.own(parse_label((await server.weight_version()).removeprefix(UPDATING)))

    async def paused(self, server: SglangClient) -> bool:
        return (await server.weight_version()).startswith(UPDATING)

    async def stop(self, server: SglangClient) -> None:
        await server.post("/pause_generation", {"mode": "abort"})
        label = (await server.weight_version()).removeprefix(UPDATING)
        await self._set_version(server, f"{UPDATING}{label}")

    async def update(self, server: SglangClient, label: Label) -> None:
        weights = {"model_path": str(self.folder.path(label).resolve()), "abort_all_requests": False}
        await server.post("/pause_generation", {"mode": "abort"})
        await self._set_version(server, f"{UPDATING}{label}")
        try:
            await server.post("/update_weights_from_disk", weights)
            await server.post("/flush_cache")
        except ValueError as error:  # status 400: it could not load them, or a request kept its cache
            raise InfrastructureError(str(error)) from error
        await server.post("/continue_generation", {})
        await self._set_version(server, str(label))

    async def _set_version(self, server: SglangClient, version: str) -> None:
        # Its default ends every request.
        await server.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})
