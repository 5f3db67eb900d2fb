"""What tests of several files share: a recorded run, and the rule that no test leaves one of the program's own threads
behind, since each owns a socket."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from mgrpo.run.importing import importing
from tests.runs import RELAY, train

# Before torch is imported, here and in the processes that tests start. Tests run side by side, and threads of several
# that share a core wait for each other, spinning: the tiny products of a test gain nothing by threads.
os.environ["OMP_NUM_THREADS"] = "1"

LONG = ("run", "mesh", "learning", "triton", "run_faults", "extending", "planning", "fsdp", "replay",
        "core_sanitizers", "models", "streaming_run", "comparison", "bench_gpu", "fake_cuda", "shards", "checkpoint",
        "scaffold", "planning_mesh")  # fmt: skip
"""Files that take a minute and more, the longest first: begun last, one of them would leave the other workers idle."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The tests' modules and what they import stay to the end: no collection of garbage walks through them."""
    with importing():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def no_thread_is_left_running() -> Iterator[None]:
    """Servers, clients and renewers that a test opened are closed when it ends."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 30.0
    while left := [t for t in threading.enumerate() if t.name.startswith("mgrpo-") and t not in before]:
        if time.monotonic() > deadline:
            pytest.fail(f"left running: {[thread.name for thread in left]}")
        time.sleep(0.01)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing by threads, and lose much beside other tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run with everything it records, one for all workers of pytest-xdist; tests that change something
    copy it first."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # the workers' folders stand in one
    out, done = root / "recorded", root / "recorded.done"
    with FileLock(root / "recorded.lock", timeout=800):
        if not done.exists():
            shutil.rmtree(out, ignore_errors=True)  # of a worker whose run has failed
            train(RELAY, out, "trainer.steps=12", "trainer.minibatches=2", "task.options.fail_every=4")
            done.touch()
    return out
