"""Locks that one process holds alone: of an address, and of a server that is being updated. Those of a run's folder are
in test_run_folder.py."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from mgrpo.engines.weight_folder import WeightFolder
from mgrpo.errors import ConfigError, DeadlineError
from mgrpo.transport.address import Binding

URL = "http://server:8000"


def held_by_another(program: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that runs `program`, which takes its arguments from sys.argv and calls hold() with its lock."""
    start = "import sys\ndef hold():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    child = subprocess.Popen(
        [sys.executable, "-c", start + program, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    if child.stdout.readline() != "held\n":
        child.kill()
        child.wait(60)
        pytest.fail("the other process did not get the lock")
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate(timeout=60)


def test_an_address_is_served_by_one_process(tmp_path: Path) -> None:
    """A second server is refused, in this process and in another; SIGKILL gives the address back, and so does
    release(), twice if need be. The lock file stays."""
    url = f"ipc://{tmp_path}/store"
    program = "import zmq; from mgrpo.transport.address import Binding\n"
    program += "bound = Binding(zmq.Context().socket(zmq.ROUTER), sys.argv[1])\nhold()"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        child = held_by_another(program, url)
        try:
            with pytest.raises(ConfigError, match="another process serves this address"):
                Binding(socket, url)
        finally:
            end(child)
        binding = Binding(socket, url)
        with context.socket(zmq.ROUTER) as other:
            with pytest.raises(ConfigError, match="another process serves this address"):
                Binding(other, url)
            socket.unbind(binding.url)
            binding.release()
            binding.release()
            Binding(other, url).release()
    assert (tmp_path / "store.lock").exists()


def test_an_address_that_cannot_be_is_named(tmp_path: Path) -> None:
    """A folder that is none, is missing, or takes no files, with the system's reason; no folder is made for it."""
    (tmp_path / "file").write_text("")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        for folder, reason in (
            (tmp_path / "file", "Not a directory"),
            (tmp_path / "missing", "No such file"),
            (Path("/proc"), "No such file"),
        ):
            with pytest.raises(ConfigError, match=f"cannot serve at ipc://{folder}/store.lock: {reason}"):
                Binding(socket, f"ipc://{folder}/store")
    assert not (tmp_path / "missing").exists()


def test_one_worker_updates_a_server_at_a_time(tmp_path: Path) -> None:
    """Another one waits its time and is told; another server's lock is free; SIGKILL gives it back."""

    async def take(url: str, seconds: float) -> None:
        async with WeightFolder(tmp_path).lock(url, seconds):
            pass

    async def inside() -> None:
        """The same from one task to another in this process, and after an error inside."""
        async with WeightFolder(tmp_path).lock(URL, 5):
            with pytest.raises(DeadlineError):
                await take(URL, 0.1)
        with pytest.raises(ValueError, match="mine"):
            async with WeightFolder(tmp_path).lock(URL, 5):
                raise ValueError("mine")
        await take(URL, 5)

    program = """import asyncio; from pathlib import Path; from mgrpo.engines.weight_folder import WeightFolder
async def main():
    async with WeightFolder(Path(sys.argv[1])).lock(sys.argv[2], 5):
        hold()
asyncio.run(main())"""
    child = held_by_another(program, str(tmp_path), URL)
    try:
        with pytest.raises(
            DeadlineError, match=r"server:8000: another worker has been updating it for 0\.1 s"
        ):
            asyncio.run(take(URL, 0.1))
        asyncio.run(take("http://other:8000", 5))
    finally:
        end(child)
    asyncio.run(take(URL, 5))
    asyncio.run(inside())
