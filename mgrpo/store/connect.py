"""A client of the store for each role."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

from mgrpo.errors import PeerError
from mgrpo.store.client import LauncherClient, StoreClient
from mgrpo.store.trainer_client import TrainerClient
from mgrpo.store.worker_client import WorkerClient


class Options(TypedDict, total=False):
    """key: this peer's keys where the link is encrypted. timeout: seconds of any call, 30 where it is not given. name:
    stable across restarts, so that a worker finds its open groups again. run: digest of the configuration; the store
    refuses another one (None: take the store's)."""

    key: Any
    timeout: float
    name: str | None
    run: str | None


@overload
def connect(url: str, role: Literal["worker"], **options: Unpack[Options]) -> WorkerClient: ...  # type: ignore[overload-overlap]
@overload
def connect(url: str, role: Literal["launcher"], **options: Unpack[Options]) -> LauncherClient: ...  # type: ignore[overload-overlap]
@overload
def connect(url: str, role: Literal["observer"], **options: Unpack[Options]) -> StoreClient: ...  # type: ignore[overload-overlap]
@overload
def connect(url: str, role: str, **options: Unpack[Options]) -> TrainerClient: ...
def connect(url: str, role: str, **options: Unpack[Options]) -> StoreClient:
    """A client of the store at `url`: a WorkerClient, TrainerClient, LauncherClient or plain StoreClient for the role
    "worker", "trainer:<agent>", "launcher" or "observer". options: see Options. Raises PeerError for another role."""
    if role == "worker":
        return WorkerClient(url, role, **options)
    if role == "launcher":
        return LauncherClient(url, role, **options)
    if role == "observer":
        return StoreClient(url, role, **options)
    if role.startswith("trainer:") and len(role) > len("trainer:"):
        return TrainerClient(url, role, **options)
    raise PeerError(f"unknown role {role!r}, expected worker, trainer:<agent>, launcher or observer")
