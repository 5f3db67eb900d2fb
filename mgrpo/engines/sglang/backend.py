"""SGLang's engine from a config. NOT RUN against a real server; see client.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgrpo.config import AgentView
from mgrpo.config.engine import SglangEngineConfig
from mgrpo.engines.server_backend import ServerBackend
from mgrpo.engines.sglang.client import SglangClient

if TYPE_CHECKING:
    from mgrpo.engines.weight_sync import WeightSync


class SglangBackend(ServerBackend):
    """See docs/engines.md. Its servers are not started by a run."""

    client = SglangClient

    @classmethod
    def open_sync(cls, view: AgentView, folder: Path) -> WeightSync[Any]:
        """See ServerBackend."""
        from mgrpo.engines.sglang.weight_sync import SglangFolderSync

        engine = view.owner.engine
        assert isinstance(engine, SglangEngineConfig)
        return SglangFolderSync(folder, engine.timeout)
