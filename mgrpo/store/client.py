"""The store from the other processes' side: what every role may ask, and what the launcher may.

Every call has a deadline; when it passes, DeadlineError names the store, the step and what was waited for. Workers and
trainers have clients of their own (worker_client.py, trainer_client.py); connect() makes the one of a role.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo.errors import DeadlineError
from mgrpo.store import records as rec
from mgrpo.transport.client import Client
from mgrpo.transport.codec import Sender

SLICE_S = 5.0  # one long poll; a wait is many of them


class StoreClient:
    """What every role can do. `run` is the run's digest; without it the store's own is taken."""

    def __init__(
        self, url: str, role: str, *, key: Any = None, timeout: float = 30.0, name: str | None = None,
        run: str | None = None, window: int = 1024,
    ) -> None:  # fmt: skip
        self.url, self.role = url, role
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self.session = secrets.token_hex(8)
        self.timeout = timeout
        self._link = Client(
            url, peer="store", sender=Sender(run or "", role, self.name, self.session), timeout=timeout,
            window=window, security=key,
        )  # fmt: skip
        self._reports = itertools.count(1)
        self._params: rec.RunParams | None = None
        self.step: int | None = None  # for error messages
        try:
            if run is None and role != "launcher":
                self._adopt(self.params())
        except BaseException:
            self._link.close()
            raise

    def _adopt(self, params: rec.RunParams) -> None:
        self._params = params
        self._link.sender = Sender(params.digest, self.role, self.name, self.session)

    def shorten_deadlines(self, seconds: float) -> None:
        """This process is to end: wait for no answer longer than `seconds`. A signal handler may call it."""
        self._link.shorten_deadlines(seconds)

    def close(self) -> None:
        """Idempotent."""
        self._link.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self, method: str, body: object, kind: Any, *, timeout: float | None = None, queue: str = ""
    ) -> Any:
        return self._link.call(method, body, timeout=timeout, step=self.step, queue=queue).decode(kind)

    def params(self) -> rec.RunParams:
        """What the run is."""
        params: rec.RunParams = self._call("params", None, rec.RunParams)
        return params

    def stats(self) -> dict[str, Any]:
        """Counts of groups, deliveries and requests."""
        stats: dict[str, Any] = self._call("stats", None, dict[str, Any])
        return stats

    def report(self, kind: str, payload: Mapping[str, object]) -> None:
        """Append a small dict (16 KiB encoded, finite numbers) to the run's durable stream of reports."""
        self._call("report", rec.Report(next(self._reports), kind, dict(payload)), int)

    def reports(self, after: int = 0, timeout: float = 0.0) -> list[rec.Reported]:
        """Up to 256 reports with a sequence number beyond `after`; waits up to `timeout` for the first one."""
        deadline = time.monotonic() + timeout
        while True:
            slice_s = max(0.0, min(SLICE_S, deadline - time.monotonic()))
            request = rec.WaitFor(slice_s, after=after)
            found: list[rec.Reported] = self._call(
                "reports", request, list[rec.Reported], timeout=self.timeout + slice_s, queue="reports"
            )
            if found or time.monotonic() >= deadline:
                return found

    def wait(
        self, *, versions: Mapping[str, int] | None = None, sealed: int = 0, not_state: str = "", after: int =
        -1, timeout: float | None = None,
    ) -> rec.World:  # fmt: skip
        """Wait until all that is given holds (see records.WaitFor), and return the state of everything.
        Level-triggered: what already holds returns at once. Raises DeadlineError."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        what = (
            f"wait(versions={dict(versions or {})}, sealed={sealed}, not_state={not_state!r}, after={after})"
        )
        while True:
            left = deadline - time.monotonic()
            request = rec.WaitFor(
                max(0.0, min(SLICE_S, left)), dict(versions or {}), sealed, not_state, after
            )
            world: rec.World = self._call(
                "wait", request, rec.World, timeout=max(left, 0.0) + 0.5, queue=what
            )
            if world.satisfied:
                return world
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"store at {self._link.url}: {what}{self._at()}: not so within {limit:g} s"
                )

    def set_control(self, state: str, reason: str = "") -> None:
        """Set the run state: "running", "stopping" or "finished"."""
        self._call("set_control", rec.Control(state, reason), None)

    def world(self) -> rec.World:
        """The state of everything one can wait for, now."""
        world: rec.World = self._call("wait", rec.WaitFor(0.0), rec.World)
        return world

    def trained(self, role: str) -> list[rec.Trained]:
        """The role's trained-group ledger: every group in its surviving optimizer history, in order."""
        rows: list[rec.Trained] = self._call("trained", role, list[rec.Trained])
        return rows

    def open_groups(
        self, worker: str = "", first: int = 0, last: int = (1 << 62) - 1
    ) -> list[rec.OpenGroupInfo]:
        """Groups with index first..last that are not sealed yet, of one worker or of all."""
        request = rec.OpenGroups(worker, first, last)
        groups: list[rec.OpenGroupInfo] = self._call("open_groups", request, list[rec.OpenGroupInfo])
        return groups

    def _at(self) -> str:
        return "" if self.step is None else f" at step {self.step}"


class LauncherClient(StoreClient):
    """Creates the run and steers it. Call create() or attach() first, unless `run` was given.

    with mgrpo.connect(url, role="launcher") as launcher:
        launcher.create(mgrpo.RunParams(run="a", digest="settings-1", roles=["main", "sub"], training_roles=["sub"],
                                        k=8, batch=32))
    """

    def attach(self) -> rec.RunParams:
        """Take part in whatever run the store holds."""
        params = self.params()
        self._adopt(params)
        return params

    def create(self, params: rec.RunParams) -> rec.RunParams:
        """Create the run in a store that holds none, or check that it holds exactly this one; times may differ, and are
        taken. Workers and trainers can connect from then on. Raises PeerError naming what is different, and for
        parameters that no run can have."""
        known: rec.RunParams = self._call("create", params, rec.RunParams)
        self._adopt(known)
        return known

    def requeue(self, role: str, queries: Sequence[str]) -> list[str]:
        """Make quarantined groups ready again; returns the state of each."""
        states: list[str] = self._call("requeue", rec.Groups(role, 0, [(q, 0) for q in queries]), list[str])
        return states

    def backup(self, path: str) -> None:
        """Write a consistent copy of the store to a new file on the store's machine."""
        self._call("backup", path, None)
