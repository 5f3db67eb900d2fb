"""One role's way through a trainer: for how long it waits, and what ends it."""

from __future__ import annotations

import time

import pytest

from mgrpo.config import load_config
from mgrpo.errors import DeadlineError, MgrpoError
from mgrpo.pipeline.role_stream import RoleStream
from mgrpo.store.records import Control, World
from mgrpo.transport.server import Server
from tests.runs import RELAY


class Waiting:
    """A store without finished groups: each look costs a second of a clock of its own."""

    def __init__(self, in_hand: list[int]) -> None:
        self.now, self._in_hand = 0.0, iter(in_hand)

    def claim(self, n: int, timeout: float) -> list[object]:
        self.now += timeout
        raise DeadlineError("fewer are sealed")

    def world(self) -> World:
        return World(True, Control("running"), [], 0, 0, next(self._in_hand))


def test_a_trainer_does_not_give_up_while_workers_have_groups_in_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forty minutes of one group, idle_timeout 30 minutes: only time in which nobody has a group counts."""
    store = Waiting([1] * 2400 + [0] * 3000)
    stream = object.__new__(RoleStream)
    stream.role, stream.store = "sub", store  # type: ignore[assignment]
    stream._config = load_config(RELAY, ["store.idle_timeout=1800"])
    monkeypatch.setattr("mgrpo.pipeline.role_stream.time.monotonic", lambda: store.now)
    looks: list[float] = []
    with pytest.raises(
        DeadlineError, match=r"trainer sub at step 3.*had any in hand for 1800 s \(store.idle_timeout\)"
    ):
        stream.claim(3, lambda: looks.append(store.now) or True)
    assert 4200 <= store.now <= 4203 and len(looks) > 4000


def test_a_trainer_notices_that_its_address_is_not_served() -> None:
    """The serving thread's fault is raised where the trainer looks whether to go on."""

    def fail() -> None:
        raise KeyError("q7")

    stream = object.__new__(RoleStream)
    with Server("tcp://127.0.0.1:0", {}, tick=fail) as server:
        stream._server = server
        deadline = time.monotonic() + 60
        while server.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(MgrpoError, match=r"the server at tcp://.* has stopped: KeyError"):
            stream.check()
