"""One type of engine, as agents.<role>.engine.type names it: how a run checks it, opens it and starts its servers.

An engine of another package is a class of its own derived from EngineBackend, beside an Engine that it opens. Launcher
and cluster plans import it too, so what is heavy is imported inside open().
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mgrpo.addresses import Addresses
from mgrpo.config import AgentView
from mgrpo.engines.base import Engine
from mgrpo.errors import ConfigError
from mgrpo.model.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start one server: program and arguments, the variables that it needs beside ours, and its GPUs."""

    arguments: Sequence[str]
    variables: Mapping[str, str]
    gpus: int = 0


class EngineBackend(ABC):
    """Never instantiated."""

    @classmethod
    @abstractmethod
    def open(
        cls,
        view: AgentView,
        files: Mapping[str, bytes],
        addresses: Addresses,
        on_event: Callable[[str], None],
    ) -> tuple[Engine, Tokenizer]:
        """The engine and tokenizer of the agent, in a rollout worker; its weights follow with Engine.load().

        files: model config and tokenizer of its policy, by path. on_event: takes a line for people, e.g. that a server
        is down. Raises ConfigError where the config or the policy does not fit.
        """

    @classmethod  # noqa: B027 - optional
    def check(cls, view: AgentView) -> None:
        """Raise ConfigError, in one line, for what can be known to fail before anything runs. Asked of agents with
        a policy of their own."""

    @classmethod
    def command(cls, view: AgentView, address: str) -> ServerCommand:
        """A server of the agent's policy that listens at unix:///path or http://host:port. Raises ConfigError where the
        config can have none."""
        raise ConfigError(
            f"agents.{view.role}.engine.type={view.agent.engine.type!r}: its servers are not started by a run"
        )
