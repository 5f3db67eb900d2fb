"""A store and trajectory logs in memory that answer as they are told, for tests of what a worker sends."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from mgrpo.errors import GroupClosedError
from mgrpo.store.worker_client import WorkerGroup
from mgrpo.trajectory_log.format import LogRef
from mgrpo.types import Trajectory


def answered(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


class FakeLog:
    """Keeps what it is sent; with `silent` it never answers."""

    def __init__(self, role: str, silent: bool = False) -> None:
        self.url = f"tcp://10.0.0.7/{role}"
        self.role, self.silent = role, silent
        self.kept: list[Trajectory] = []

    def append(self, trajectory: Trajectory, *, attempt: int = 0, index: int = 0) -> Future[LogRef]:
        self.kept.append(trajectory)
        return Future() if self.silent else answered(SimpleNamespace(role=self.role))

    def close(self) -> None:
        pass


class FakeStore:
    """Takes records of all groups but the `closed` ones; `opened` says what open_group answers."""

    url = "tcp://10.0.0.1"

    def __init__(self, closed: tuple[str, ...] = ()) -> None:
        self.closed = closed
        self.records: list[tuple[str, str, int]] = []  # (method, query, rollout)
        self.reasons: list[str] = []
        self.reports: list[dict[str, Any]] = []
        self.opened: dict[int, WorkerGroup | BaseException] = {}
        self.metas: list[dict[str, Any]] = []
        self.state = "running"

    def _take(self, method: str, group: WorkerGroup, rollout: int) -> Future[Any]:
        self.records.append((method, group.query, rollout))
        if group.query in self.closed:
            return answered(GroupClosedError(f"group {group.query!r} is dropped"))
        return answered(None)

    def invocation_done(self, group: WorkerGroup, rollout: int, **_: Any) -> Future[Any]:
        return self._take("invocation_done", group, rollout)

    def rollout_final(self, group: WorkerGroup, rollout: int, **_: Any) -> Future[Any]:
        return self._take("rollout_final", group, rollout)

    def rollout_fail(self, group: WorkerGroup, rollout: int, reason: str) -> Future[Any]:
        self.reasons.append(reason)
        return self._take("rollout_fail", group, rollout)

    def open_group(self, *, index: int, meta: dict[str, Any], **_: Any) -> WorkerGroup:
        self.metas.append(meta)
        group = self.opened[index]
        if isinstance(group, BaseException):
            raise group
        return group

    def report(self, kind: str, payload: dict[str, Any]) -> None:
        self.reports.append(payload)

    def world(self) -> Any:
        roles = [SimpleNamespace(version=0)]
        return SimpleNamespace(control=SimpleNamespace(state=self.state), roles=roles, paused=[])

    def be_alive(self) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {"roles": {"main": {"skipped": 0, "step": -1}}}

    def shorten_deadlines(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


def group(query: str, index: int = 0, k: int = 2, state: str = "open", finished: int = 0) -> WorkerGroup:
    return WorkerGroup(query, index, 0, state, k, list(range(finished)))
