"""The way from one sender, a rank of a trainer, to the workers of one server: a process group of their own, in which
the sender is rank 0 and the workers follow.

One group a sender and server, so a server that dies takes no other with it, and no sender receives what another sends.
Both sides wait as long as `seconds` for one message, and both find out at once when a process of the other side ends
(gloo; NCCL notices at the deadline). After any failure the group is of no use: close it, and open another one under
another key. Plain torch: this file also runs in the servers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from mgrpo.errors import InfrastructureError
from mgrpo.waiting import wait_until

Backend = Literal["gloo", "nccl"]
POLL_SECONDS = 0.002  # between two looks at a message that is under way
_OURS_ALONE = {  # for NCCL: no thread of torch's ends this process when a server dies; we watch the time ourselves
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class Link:
    """One end. Raises InfrastructureError where the others have not come within `seconds`."""

    def __init__(
        self, backend: Backend, store: Any, rank: int, size: int, address: str, seconds: float
    ) -> None:
        """store: where the ends meet, for this group alone. address: of this machine, as the others reach it."""
        self._seconds, self._on_gpu = seconds, backend == "nccl"
        self._group: Any = None
        try:
            if backend == "gloo":
                self._group = _open_gloo(store, rank, size, address, seconds)
            else:
                _within(seconds, lambda: self._open_nccl(store, rank, size))
        except RuntimeError as error:
            self.close()
            raise InfrastructureError(f"no connection within {seconds:g} s: {_first_line(error)}") from None

    def _open_nccl(self, store: Any, rank: int, size: int) -> None:
        with _environment(_OURS_ALONE):
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=self._seconds)
            self._group = dist.ProcessGroupNCCL(store, rank, size, nccl)
        # The communicator comes with the first message.
        self.wait(self.begin(torch.zeros(8, dtype=torch.uint8, device="cuda")))

    def begin(self, message: Tensor) -> tuple[Any, float]:
        """Start to send or receive a message, as this end is rank 0 or another; hand the result to wait()."""
        try:
            return self._group.broadcast(message, 0, timedelta(seconds=self._seconds)), time.monotonic()
        except (RuntimeError, AttributeError) as error:  # closed, or broken already
            raise InfrastructureError(_first_line(error)) from None

    def wait(self, under_way: tuple[Any, float]) -> None:
        """Until it is there, or has left. Raises InfrastructureError where that takes longer than the link's seconds,
        or the other side has ended."""
        work, began = under_way
        wait_until(
            work.is_completed,
            began + self._seconds + 1.0 - time.monotonic(),  # gloo notices by itself, with better words
            lambda: f"a message is under way for {self._seconds:g} s",
            pause=POLL_SECONDS,
            error=InfrastructureError,
        )
        try:
            work.wait()
        except RuntimeError as error:
            raise InfrastructureError(_first_line(error)) from None
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Leave, also while a message is under way. Idempotent."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()


def meeting_point(address: str, port: int, seconds: float) -> Any:
    """The store that the trainer's rank 0 serves. Raises InfrastructureError where it cannot be reached."""
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        raise InfrastructureError(f"{address}:{port}: {_first_line(error)}") from None


def serve_meeting_point(seconds: float) -> Any:
    """A store that others reach under any address of this machine, at its `port`."""
    return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def group_store(store: Any, key: str) -> Any:
    """The part of a store that belongs to one group."""
    return PrefixStore(key, store)


def own_address(towards: str) -> str:
    """This machine's address on the way to another (a name, an address, or "" for this one)."""
    if towards in ("", "localhost", "127.0.0.1"):
        return "127.0.0.1"
    family, *_, there = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # sends nothing
        return str(probe.getsockname()[0])


def _open_gloo(store: Any, rank: int, size: int, address: str, seconds: float) -> Any:
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    gloo._timeout = timedelta(seconds=seconds)
    return dist.ProcessGroupGloo(store, rank, size, gloo)


def _within(seconds: float, act: Callable[[], None]) -> None:
    """Do it on a thread that is left behind where it takes longer: NCCL waits for peers that never come without end."""
    device, error = torch.cuda.current_device(), list[BaseException]()

    def run() -> None:
        try:
            torch.cuda.set_device(device)
            act()
        except BaseException as raised:  # raised again by the thread that waits
            error.append(raised)

    thread = threading.Thread(target=run, name="mgrpo-nccl", daemon=True)
    thread.start()
    thread.join(seconds)
    if error:
        raise error[0]
    if thread.is_alive():
        raise InfrastructureError(f"no connection within {seconds:g} s")


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: Exception) -> str:
    """gloo's own place in its sources, and what follows the reason, tell nobody anything."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.partition("] ")[2] or text if text.startswith("[") else text
