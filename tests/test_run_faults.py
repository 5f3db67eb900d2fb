"""Whole runs whose processes are stopped, and whole runs over a bad network: named errors, and the run goes on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.chaos.wire import CannotBuild, lossy_run
from tests.runs import (
    RELAY,
    command,
    final_weights,
    leftovers,
    processes_of,
    started,
    steps_of,
    train,
    wait_for,
)
from tests.stopped import stand_still

STEPS = 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with, bit for bit."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(RELAY, out, f"trainer.steps={STEPS}")
    return out


def test_a_stopped_store_is_named_and_the_run_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    """SIGSTOP of the store until some process has given up on it: that one names the store, what it asked and the
    step, is started again, and the weights are those of the undisturbed run."""
    out = tmp_path / "run"
    sets = [f"--set=trainer.steps={STEPS}", "--set=store.timeout=6"]
    with started(command("train", str(RELAY), "--out", str(out), *sets)) as process:
        wait_for(lambda: steps_of(out) >= 1 or process.poll() is not None, "step 1")
        store = processes_of(out)["store"]
        stand_still(store)
        try:
            named = re.compile(
                r"error: store at ipc://\S+/store: .*(at step \d+|'\d+/\d+'|wait).* within 6 s"
            )
            wait_for(lambda: any(map(named.search, last_words(out))), "a named error", 40)
        finally:
            os.kill(store, signal.SIGCONT)
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    assert "started again" in output
    assert final_weights(out) == final_weights(undisturbed)
    assert leftovers(out) == []


def test_a_part_that_is_stopped_by_hand_comes_back(undisturbed: Path, tmp_path: Path) -> None:
    """SIGTERM to the store, a trainer and the worker, which each end with status 0 although the run goes on: they are
    started again, once each, and the weights are those of the undisturbed run."""
    out = tmp_path / "run"
    with started(command("train", str(RELAY), "--out", str(out), f"--set=trainer.steps={STEPS}")) as process:
        wait_for(lambda: steps_of(out) >= 1 or process.poll() is not None, "step 1")
        found = processes_of(out)
        for name in ("store", "trainer-left", "rollout"):
            os.kill(found[name], signal.SIGTERM)
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    assert output.count("ended with status 0 before the run was over; started again (restart 1)") == 3, output
    assert final_weights(out) == final_weights(undisturbed)
    assert leftovers(out) == []


def last_words(out: Path) -> list[str]:
    """What the processes of a run have written so far."""
    return [path.read_text() for path in (out / "logs").glob("*.log")]


def test_a_run_over_a_wire_that_loses_and_delays_packets(undisturbed: Path, tmp_path: Path) -> None:
    """Two network namespaces, store and main on one side, the other agents and the worker on the other, each at its own
    address, 1 % loss and 50 ms delay each way: the run completes, with the weights of the undisturbed run."""
    try:
        result = lossy_run(tmp_path, STEPS)
    except CannotBuild as why:
        pytest.skip(str(why))
    assert result["weights"] == final_weights(undisturbed)
    if result["wire"] == "tun":  # netem does not tell
        assert int(str(result["lost"])) > 0
