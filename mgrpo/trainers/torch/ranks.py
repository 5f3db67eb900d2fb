"""The processes of one trainer, which torchrun starts and ends together: rank 0 sends commands, the others run them.

Rank 0 alone talks to store, trajectory log and engines. The others wait for its commands (`receive`), take part in the
collectives that follow, and leave when the command is to. A waiting rank looks at rank 0's heartbeat, which moves
whenever rank 0 looks at the run; one that stands still longer than the deadline ends the rank with an error that names
it.

One process is the same class without a process group: `broadcast` does nothing, `gather` returns a list of one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from mgrpo.errors import ConfigError, DeadlineError, PeerError
from mgrpo.waiting import wait_until

COLLECTIVE_SECONDS = 600.0  # the longest that one rank may let the others wait inside a step
T = TypeVar("T")
POLL_SECONDS = 0.02  # between two looks of a rank that waits for long
_FORGET_AFTER = 64  # commands that stay in the store of the process group


def under_torchrun() -> bool:
    """Was this process started as a rank?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class Ranks:
    """Use as a context manager; leaving it takes the process group down. Not thread-safe but for `files`."""

    def __init__(
        self, size: int = 1, device: str = "cpu", silence: float = COLLECTIVE_SECONDS, last: float = 600.0
    ) -> None:
        """Join the ranks that torchrun started, or stand alone (size 1).

        device: "cpu" or "cuda"; there every rank takes the GPU of its local rank. silence: seconds for which a rank
        waits without a heartbeat of rank 0. last: seconds for which it waits after SIGTERM, since rank 0
        still takes a checkpoint with all ranks. Raises ConfigError when torchrun started another number.
        """
        self.rank, self.size, self._silence, self._last = 0, size, silence, last
        self.files: dist.ProcessGroup | None = None  # for checkpoints, which are written beside the steps
        self._commands_sent = 0  # or received
        self._terminated = 0.0  # when; no Event: a signal that comes twice would wait for its own lock
        if size == 1:
            return
        found = os.environ.get("WORLD_SIZE", "1") if under_torchrun() else "1"
        if found != str(size):
            raise ConfigError(f"torchrun started {found} ranks, the config's policy.ranks is {size}")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        limit = timedelta(seconds=COLLECTIVE_SECONDS)
        store, self.rank, _ = next(iter(rendezvous("env://", timeout=limit)))
        self._store = PrefixStore("mgrpo", store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore("ranks", store), rank=self.rank, world_size=size, timeout=limit
        )
        self._commands = dist.new_group(backend="gloo", timeout=limit)
        self.files = dist.new_group(backend="gloo", timeout=limit)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size > 1 and kind is None:  # after an error the group may hang: the process ends without
            dist.destroy_process_group()

    # -- rank 0 ----------------------------------------------------------------------------------------------------

    def broadcast(self, command: str, parts: Sequence[Any] | None = None) -> None:
        """Send `command` to every rank, and parts[r] (picklable) to rank r."""
        if self.size == 1:
            return
        self._store.set(f"command/{self._commands_sent}", "")
        if self._commands_sent >= _FORGET_AFTER:
            self._store.delete_key(f"command/{self._commands_sent - _FORGET_AFTER}")
        self._commands_sent += 1
        out: list[Any] = [None]
        parts = parts if parts is not None else [None] * self.size
        dist.scatter_object_list(out, [(command, part) for part in parts], src=0, group=self._commands)

    def heartbeat(self) -> None:
        """Say to those who wait that rank 0 lives."""
        if self.size > 1:
            self._store.add("beat", 1)

    # -- the others ------------------------------------------------------------------------------------------------

    def defer_signals(self) -> None:
        """No signal ends a rank that rank 0 may still need for its last checkpoint; it shortens the wait."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self._terminated = self._terminated or time.monotonic()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    def receive(self) -> tuple[str, Any]:
        """Rank 0's next command, and this rank's part. Raises DeadlineError or PeerError when none can come."""
        self._wait_for(f"command/{self._commands_sent}")
        self._commands_sent += 1
        out: list[Any] = [None]
        dist.scatter_object_list(out, None, src=0, group=self._commands)
        command, part = out[0]
        return command, part

    def _wait_for(self, key: str) -> None:
        me, began = f"rank {self.rank} of {self.size}", time.monotonic()

        def sent() -> bool:
            # Asked again and again: a wait of the store's own complains on stderr whenever its time is up.
            if self._from_rank_0(lambda: self._store.check([key])):
                return True
            if self._terminated and time.monotonic() - max(began, self._terminated) > self._last:
                raise DeadlineError(f"{me}: was to stop, no command of rank 0 within {self._last:g} s")
            return False

        wait_until(
            sent,
            self._silence,
            lambda: f"{me}: no command and no heartbeat of rank 0 within {self._silence:g} s",
            progress=lambda: self._from_rank_0(lambda: self._store.add("beat", 0)),
            pause=POLL_SECONDS,
        )

    def _from_rank_0(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except RuntimeError as error:
            raise PeerError(f"rank {self.rank} of {self.size}: rank 0 is gone ({error})") from None

    # -- all -------------------------------------------------------------------------------------------------------

    def gather(self, item: Any) -> list[Any]:
        """Everybody's item (picklable), in the order of ranks, on every rank."""
        if self.size == 1:
            return [item]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, item, group=self._commands)
        return out
