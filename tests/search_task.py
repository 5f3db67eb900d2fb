"""The relay (tests/relay.py) with a search before each rollout, for whole runs whose service goes down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question
from mgrpo.services.client import HttpService
from mgrpo.services.config import ServiceConfig
from mgrpo.types import Rollout
from tests.relay import RelayTask

MAX_OUTAGE = "SEARCH_TASK_MAX_OUTAGE"  # a variable: a run's options cannot change when it is resumed


class SearchTask(RelayTask):
    """options: {"url": of the search}, and those of the relay."""

    def __init__(self, options: Mapping[str, object], roles: Sequence[str]) -> None:
        super().__init__({name: value for name, value in options.items() if name != "url"}, roles)
        patience = float(os.environ.get(MAX_OUTAGE, "120"))
        config = ServiceConfig(
            url=str(options["url"]), attempts=3, backoff=0.1, timeout=20.0, max_outage=patience
        )
        self._search = HttpService("search", config)

    async def play(self, question: Question, episode: Episode) -> Rollout:
        path = f"/{episode.query}/{episode.rollout}/{episode.attempt}"
        await episode.tool("search", self._ask, path, attempts=1)
        return await super().play(question, episode)

    async def close(self) -> None:
        await self._search.close()

    async def _ask(self, path: str) -> None:
        def read(raw: Any) -> None:
            if raw != {"hits": []}:
                raise ValueError("expected no hits")

        await self._search.request("GET", path, read, pure=False)
