"""Ranks of one trainer in a test, started as torchrun would start them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tests.runs import started
from tests.test_run import free_ports


@contextmanager
def ranks_of(
    module: str, *arguments: str, size: int = 2, timeout: float = 800
) -> Iterator[Callable[[], None]]:
    """`size` processes of `python -m module arguments`, which do not outlive the block. Called, it waits until all have
    ended well, `timeout` seconds for each."""
    (port,) = free_ports(1)
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # As torchrun: threads of several ranks wait for each other's cores, spinning.
    shared["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", module, *arguments]
    with ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = [
            stack.enter_context(started(command, shared | {"RANK": str(rank)})) for rank in range(size)
        ]

        def wait() -> None:
            for process in processes:
                output, _ = process.communicate(timeout=timeout)
                assert process.returncode == 0, output

        yield wait


def run_ranks(module: str, *arguments: str, size: int = 2, timeout: float = 800) -> None:
    """The same, from beginning to end."""
    with ranks_of(module, *arguments, size=size, timeout=timeout) as wait:
        wait()
