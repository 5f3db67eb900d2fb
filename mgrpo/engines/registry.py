"""The engines by name. A new one: a folder beside vllm/ and a line here, or a class in a package of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mgrpo.addresses import Addresses
from mgrpo.config import AgentView, RunConfig, view_of
from mgrpo.engines.backend import EngineBackend
from mgrpo.engines.base import Engine
from mgrpo.model.tokens import Tokenizer
from mgrpo.plugins import find_class

BUILT_IN = {
    "hf": "mgrpo.engines.hf.backend:HfBackend",
    "vllm": "mgrpo.engines.vllm.backend:VllmBackend",
    "sglang": "mgrpo.engines.sglang.backend:SglangBackend",
}
GROUP = "mgrpo.engines"


def find_engine(view: AgentView) -> type[EngineBackend]:
    """The class that agents.<role>.engine.type names; of a role that shares a policy, the owner's. Raises ConfigError
    for a name that is not known."""
    name, where = view.owner.engine.type, f"agents.{view.owner_role}.engine.type"
    return find_class(where, name, BUILT_IN, GROUP, EngineBackend)  # type: ignore[type-abstract]


def open_engine(
    config: RunConfig,
    role: str,
    files: Mapping[str, bytes],
    addresses: Addresses,
    on_event: Callable[[str], None],
) -> tuple[Engine, Tokenizer]:
    """The engine and tokenizer of `role`; see EngineBackend.open()."""
    view = view_of(config, role)
    return find_engine(view).open(view, files, addresses, on_event)
