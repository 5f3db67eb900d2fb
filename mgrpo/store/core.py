"""The store without a network: the ledger in memory, its rows in the file, and nothing in between.

    handle(...), handle(...), ...   change memory and collect rows
    commit()                        makes them durable, all or none; only then may the answers leave

A failed commit leaves memory ahead of the disk, so `reload` reads memory back from the file. Groups that are
settled live only in the file; `handle` brings back the ones that a request is about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from mgrpo.errors import ConfigError
from mgrpo.store import records as rec
from mgrpo.store.database import Database
from mgrpo.store.ledger import Ledger, check_sender, queries_of
from mgrpo.store.state import State
from mgrpo.transport.codec import Refusal, Sender, encode

NOT_CREATED = (
    "this store holds no run yet; create it first: "
    'mgrpo.connect(url, role="launcher").create(mgrpo.RunParams(...))'
)


class Core:
    """The store in `database`. `ledger` is None while the file holds no run, or after drop()."""

    def __init__(
        self, database: Database, now: float, make_ledger: Callable[[State], Ledger] = Ledger
    ) -> None:
        self.database = database
        self._make_ledger = make_ledger
        self.ledger: Ledger | None = None
        self.reload(now)

    def create(self, params: rec.RunParams, now: float) -> None:
        """Make the run durable, or check that the file holds this one (ConfigError naming both). Its times may
        change: those of `params` are taken."""
        known = self.database.params()
        check_params(params)
        if known is None or (known != params and _but_for_times(known) == _but_for_times(params)):
            self.database.commit({"meta": [("params", encode(params))]})
            self.reload(now)
        elif known != params:
            raise ConfigError(
                f"store {self.database.path} holds run {known.run!r} (digest {known.digest!r}), not {params.run!r} "
                f"(digest {params.digest!r}): {_differences(known, params)}; take another file, or attach() to that run"
            )

    def handle(self, method: str, body: Any, sender: Sender, now: float) -> Any:
        """One request of one sender; raises Refusal or BadMessage, then nothing has changed."""
        ledger = self.ledger_for(method, sender)
        check_sender(method, body, sender)
        wanted = queries_of(method, body)
        if isinstance(body, rec.Resume):
            wanted = self.database.beyond(body.role, body.checkpoint_step)
        for query in wanted:
            if query not in ledger.state.groups:
                self.database.load_group(ledger.state, query, now)
        return ledger.handle(method, body, sender, now)

    def ledger_for(self, method: str, sender: Sender) -> Ledger:
        """The ledger, once the sender is known to be of this run. `params` may be asked by whoever names no
        run."""
        if self.ledger is None:
            raise Refusal("NOT_CREATED", NOT_CREATED)
        params = self.ledger.state.params
        if sender.run != params.digest and not (sender.run == "" and method == "params"):
            todo = (
                "connect with run=None to take the store's"
                if sender.run
                else "call attach(), or create() with the run's parameters, first"
            )
            raise Refusal(
                "WRONG_RUN",
                f"{sender.role} {sender.name!r} has run digest {sender.run!r}, "
                f"this store serves run {params.run!r} with digest {params.digest!r}; {todo}",
            )
        return self.ledger

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.ledger is not None:
            self.ledger.tick(now)

    def commit(self) -> None:
        """Make everything handled so far durable. Raises sqlite3.Error; then call drop() and later reload()."""
        if self.ledger is not None:
            self.database.commit(self.ledger.state.take_dirty())
            self.ledger.state.retire()

    def drop(self) -> None:
        """Forget what is in memory."""
        self.ledger = None

    def reload(self, now: float) -> None:
        """Read memory back from the file."""
        state = self.database.load(now)
        self.ledger = None if state is None else self._make_ledger(state)

    def trained(self, role: str) -> list[rec.Trained]:
        """The role's surviving optimizer history, as of the last commit."""
        return [rec.Trained(*row) for row in self.database.trained(role)]


def _differences(known: rec.RunParams, params: rec.RunParams) -> str:
    """What `params` says otherwise than the run in the file, each with both values; without the times, which may."""
    known, params = _but_for_times(known), _but_for_times(params)
    return ", ".join(
        f"{name} {getattr(known, name)!r} there, {getattr(params, name)!r} here"
        for name in known.__struct_fields__
        if getattr(known, name) != getattr(params, name)
    )


def _but_for_times(params: rec.RunParams) -> rec.RunParams:
    return replace(params, lease_s=0.0, group_timeout_s=0.0, heartbeat_timeout_s=0.0)


def check_params(params: rec.RunParams) -> None:
    """Raise ConfigError for parameters that no run can have."""
    extra = set(params.training_roles) - set(params.roles)
    if not params.training_roles or extra or len(set(params.roles)) != len(params.roles):
        raise ConfigError(f"training roles {params.training_roles} of roles {params.roles}")
    if not params.digest:
        raise ConfigError("a run needs the digest of its configuration")
    if params.pool and params.pool < params.batch:
        raise ConfigError(f"pool = {params.pool}, expected 0 or at least the {params.batch} groups of a step")
    if params.claim_window > 1 and not params.in_order:
        raise ConfigError(f"claim_window = {params.claim_window} has no effect without in_order")
    if params.admitted_lag() < 0:
        raise ConfigError(
            f"claim_window = {params.claim_window} with steps of {params.batch} groups needs max_lag "
            f"{params.max_lag - params.admitted_lag()}, got {params.max_lag}"
        )
    for name in ("lease_s", "group_timeout_s", "heartbeat_timeout_s"):
        if not 0.0 < getattr(params, name) < 1e7:
            raise ConfigError(f"{name} = {getattr(params, name)}, expected seconds above 0")
