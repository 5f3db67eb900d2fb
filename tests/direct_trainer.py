"""Two trainer ranks in processes of their own (tests/direct_ranks.py), told what to do by a test."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tests.runs import ROOT
from tests.test_run import free_ports

WAIT = 300.0  # seconds for anything at all


class Trainer:
    """Two ranks, told what to do through rank 0."""

    def __init__(self, folder: Path, bucket: int) -> None:
        """folder: of the policies to start from, and of what was sent. bucket: bytes."""
        (port,) = free_ports(1)
        self.said: list[str] = []
        self.folder = folder
        self._log = (folder / "ranks.log").open("w+")
        command = [sys.executable, "-m", "tests.direct_ranks", str(folder), str(bucket)]
        self._processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(rank, port),
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else self._log,
                stderr=self._log,
                text=True,
            )
            for rank in range(2)
        ]

    def do(self, what: str, **arguments: Any) -> Any:
        """What it answered; {"error"} for one of our errors."""
        self.begin(what, **arguments)
        main = self._processes[0]
        assert main.stdout is not None
        for line in main.stdout:
            if line.startswith("@"):
                found = json.loads(line[1:])
                self.said += found["said"]
                return found
        self._log.seek(0)
        raise AssertionError(f"rank 0 has ended: {self._log.read()}")

    def begin(self, what: str, **arguments: Any) -> None:
        """Do it, and do not wait."""
        main = self._processes[0]
        assert main.stdin is not None
        main.stdin.write(json.dumps([what, arguments]) + "\n")
        main.stdin.flush()

    def publish(self, label: str) -> dict[str, torch.Tensor]:
        """The weights that were sent."""
        found = self.do("publish", label=label)
        assert "error" not in found, found
        return safetensors.torch.load_file(self.folder / f"{label}.safetensors")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait as for rollouts."""
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen: {self.said}"
            self.do("wait")
            time.sleep(0.1)

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.kill()
            process.communicate(timeout=WAIT)
        self._log.close()


def _environment(rank: int, port: int) -> dict[str, str]:
    own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return os.environ | own | {"GLOO_SOCKET_IFNAME": "lo"}
