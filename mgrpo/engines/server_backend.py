"""From a config to an engine over servers: what the backends of all servers have in common."""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgrpo.addresses import Addresses
from mgrpo.config import AgentView
from mgrpo.config.engine import ServerEngineConfig
from mgrpo.engines.backend import EngineBackend
from mgrpo.engines.base import Engine
from mgrpo.engines.client import LOOK_SECONDS, ServerClient, check_healthy
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.model.routers import Routing, routing_in, routing_of
from mgrpo.model.tokens import Tokenizer

if TYPE_CHECKING:
    from mgrpo.engines.weight_sync import WeightSync


class ServerBackend(EngineBackend):
    """An engine whose servers are reached by ServerClients of one class."""

    client: type[ServerClient]

    @classmethod
    @abstractmethod
    def open_sync(cls, view: AgentView, folder: Path) -> WeightSync[Any]:
        """The way of new weights that the config chose. folder: for them."""

    @classmethod
    def open(
        cls,
        view: AgentView,
        files: Mapping[str, bytes],
        addresses: Addresses,
        on_event: Callable[[str], None],
    ) -> tuple[Engine, Tokenizer]:
        """See EngineBackend."""
        from mgrpo.engines.pool import EnginePool
        from mgrpo.engines.server_engine import ServerEngine
        from mgrpo.model.policy_files import tokenizer_from_files
        from mgrpo.model.vocabulary import Vocabulary

        role, owner, length = view.role, view.owner_role, view.agent.max_length
        engine = view.owner.engine
        assert isinstance(engine, ServerEngineConfig)
        tokenizer, vocab_size = tokenizer_from_files(files, role)
        if addresses.weights is None:
            raise ConfigError(f"agents.{owner}.engine: no folder for weights is known")
        root = Path(engine.folder) if engine.folder is not None else addresses.weights
        sync = cls.open_sync(view, root / owner)
        sync.on_event = lambda line: on_event(f"{role}: {line}")
        routing = None
        if view.owner.policy.routing_replay:
            routing = routing_of(json.loads(files["config.json"]), f"policy of {role}")
        pool = EnginePool(
            cls._clients(engine, engine.urls or addresses.engines[owner], routing),
            sync,
            timeout=engine.timeout,
            max_length=length,
            on_event=sync.on_event,
        )
        vocabulary = Vocabulary(tokenizer, vocab_size, role)
        made = ServerEngine(
            pool,
            sync,
            name=f"policy of {role}",
            vocabulary=vocabulary,
            max_length=length,
            tokenizer=tokenizer,
        )
        return made, tokenizer

    @classmethod
    def check(cls, view: AgentView) -> None:
        """The temperature, and the health of servers that run already."""
        engine, temperature = view.agent.engine, view.agent.loss.temperature
        coolest, hottest = cls.client.temperatures
        if not coolest <= temperature <= hottest:
            raise ConfigError(
                f"agents.{view.role}.loss.temperature={temperature:g}: {cls.client.name} samples at "
                f"{coolest:g}..{hottest:g}"
            )
        if engine.running_servers:
            assert isinstance(engine, ServerEngineConfig)
            routing = None
            if view.agent.policy.routing_replay and view.agent.model is not None:
                routing = routing_in(Path(view.agent.model), f"agents.{view.role}.model")
            clients = cls._clients(engine, engine.urls, routing)
            look = None if routing is None else _look_at_routing
            check_healthy(f"agents.{view.role}.engine.urls", clients, look)

    @classmethod
    def _clients(
        cls, engine: ServerEngineConfig, urls: Sequence[str], routing: Routing | None
    ) -> list[ServerClient]:
        clients = [cls.client(url, engine.timeout) for url in urls]
        for client in clients:
            client.routing = routing
        return clients


async def _look_at_routing(client: ServerClient) -> None:
    """Health, and whether it reports experts. A server that does not answer in time, as one that is paused, is asked
    again by the first worker."""
    await client.healthy()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOOK_SECONDS):
            if not await client.reports_routing((await client.info()).model):
                raise InfrastructureError(client.no_routing())
