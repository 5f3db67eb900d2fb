"""The launcher's processes: whatever way one ends it is started again, never for ever, and none outlives a stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from mgrpo.errors import ConfigError
from mgrpo.run import supervisor
from mgrpo.run.interrupts import SAME_SECONDS, Interrupts
from mgrpo.run.monitor import Progress, part_of
from mgrpo.run.supervisor import ChildFailed, Supervisor
from tests.runs import wait_for

FOREVER = "echo ready; exec sleep 1000"
DEAF = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


class Shells(Supervisor):
    """A supervisor whose children are shell scripts."""

    def _spawn(self, command: Sequence[str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
        return super()._spawn(["sh", "-c", command[3]], log)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def shells(tmp_path: Path, said: list[str]) -> Iterator[Shells]:
    with Shells(tmp_path / "logs", said.append, Interrupts()) as children:
        yield children


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The supervisor's time, moved by hand."""
    now = SimpleNamespace(at=1000.0)
    fake = SimpleNamespace(monotonic=lambda: now.at, sleep=time.sleep)
    monkeypatch.setattr(supervisor, "time", fake)
    return now


def ended(children: Supervisor, name: str) -> None:
    wait_for(lambda: name not in children.running(), f"the end of {name}")


def ready(tmp_path: Path, name: str) -> None:
    wait_for(lambda: "ready" in (tmp_path / "logs" / f"{name}.log").read_text(), f"{name} is ready")


def restarted(children: Supervisor) -> str:
    lines: list[str] = []
    wait_for(lambda: bool(lines) or bool(lines.extend(children.poll())), "a restart")
    return lines[0]


def test_status_0_is_no_end_while_the_run_goes_on(shells: Shells) -> None:
    """A part that was told to stop by hand, or ended too early, comes back, and the line says how it ended."""
    shells.start("trainer-main", ["exit 0"])
    ended(shells, "trainer-main")
    line = restarted(shells)
    assert "trainer-main ended with status 0 before the run was over; started again (restart 1)" in line


@pytest.mark.parametrize("by", ["SEGV", "ABRT", "KILL"])
def test_three_deaths_at_the_start_end_the_run_by_name(shells: Shells, by: str) -> None:
    """A part that dies by a signal again and again: two restarts with pauses, then the end with part, signal, log."""
    shells.start("rollout-0", [f"kill -{by} $$"])
    lines: list[str] = []

    def fails() -> bool:
        lines.extend(shells.poll())
        return False

    with pytest.raises(ChildFailed, match=rf"rollout-0 died 3 times in a row .*SIG{by}.*rollout-0\.log"):
        wait_for(fails, "the end of the run")
    assert len(lines) == 2 and all(f"ended by signal SIG{by}" in line for line in lines)


def test_pauses_grow_up_to_a_bound(
    shells: Shells, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.5 s before the first restart, twice as long each time, 30 s at most; none before its time has come."""
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 100)
    monkeypatch.setattr(supervisor, "MAX_DEATHS", 100)
    shells.start("store", ["exit 1"])
    for pause in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        ended(shells, "store")
        assert shells.poll() == []  # noticed
        clock.at += 0.99 * pause
        assert shells.poll() == []
        clock.at += 0.02 * pause
        assert len(shells.poll()) == 1


def test_kills_from_outside_are_survived_as_long_as_there_is_progress(
    shells: Shells, clock: SimpleNamespace
) -> None:
    """Fifteen kills of a part that gets further in between: fifteen restarts. Ten without: the end, with a hint."""
    shells.start("trainer-sub", [FOREVER])

    def killed() -> list[str]:
        clock.at += 5.0  # longer than a start
        os.kill(shells.pids()["trainer-sub"], signal.SIGKILL)
        ended(shells, "trainer-sub")
        assert shells.poll() == []
        clock.at += 31.0
        return shells.poll()

    for _ in range(15):
        assert len(killed()) == 1
        shells.advanced(["trainer-sub", "somebody else"])
    for _ in range(9):
        assert len(killed()) == 1
    with pytest.raises(ChildFailed, match=r"died 10 times in a row without progress.*SIGKILL.*out of memory"):
        killed()


def test_a_long_life_is_progress(shells: Shells, clock: SimpleNamespace) -> None:
    """Errors with more than `healthy` seconds between them are never three in a row."""
    shells.start("engine-main-0", ["exit 3"], 20.0)
    for _ in range(5):
        clock.at += 21.0
        ended(shells, "engine-main-0")
        assert shells.poll() == []
        clock.at += 31.0
        assert len(shells.poll()) == 1


def test_last_words_are_those_of_the_last_life(shells: Shells, tmp_path: Path) -> None:
    """A life that ends without a word is not blamed for what an earlier one wrote."""
    shells.start(
        "store", [f"test -e {tmp_path}/second && exit 1; touch {tmp_path}/second; echo old words; exit 1"]
    )
    ended(shells, "store")
    assert "error: old words" in restarted(shells)
    ended(shells, "store")
    assert "error: no output" in restarted(shells)


def test_status_2_ends_the_run_at_once(shells: Shells) -> None:
    """A mistake in the config is not tried again."""
    shells.start("store", ["echo error: seed; exit 2"])
    ended(shells, "store")
    with pytest.raises(ConfigError, match="store: error: seed"):
        shells.poll()


def test_a_part_that_hangs_in_its_stop_is_named_and_killed(
    shells: Shells, said: list[str], tmp_path: Path
) -> None:
    """After stop_seconds it gets SIGKILL, and its name and log are said; the others have stopped in time."""
    shells.start("rollout-0", [DEAF], stop_seconds=0.2)
    shells.start("rollout-1", [FOREVER])
    ready(tmp_path, "rollout-0")
    shells.stop()
    assert shells.running() == []
    killed = [line for line in said if "killed" in line]
    assert len(killed) == 1 and "rollout-0 did not stop within 0.2 s and was killed (log: " in killed[0]


def test_another_interrupt_ends_all_patience(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer may take long to write its checkpoint, which the terminal says; the next Ctrl-C kills it and what it
    has started, and a stop that follows is not patient again."""
    monkeypatch.setattr(supervisor, "QUIET_SECONDS", 0.05)
    interrupts = Interrupts()

    def on_event(line: str) -> None:
        said.append(line)
        if line.startswith("waiting for"):
            interrupts.arrived(signal.SIGINT, None)

    with Shells(tmp_path / "logs", on_event, interrupts) as children:
        script = f"sleep 1000 & echo $! > {tmp_path}/inner; {DEAF}"
        children.start("trainer-main", [script], stop_seconds=600.0, saves="write its checkpoint")
        children.start("store", [DEAF], stop_seconds=600.0)
        ready(tmp_path, "trainer-main")
        ready(tmp_path, "store")
        inner = int((tmp_path / "inner").read_text())
        children.stop(["trainer-main"])
        assert children.running() == ["store"]
    assert children.running() == []
    assert (
        said[0] == "waiting for trainer-main to write its checkpoint (up to 600 s; Ctrl-C again ends it now)"
    )
    assert "trainer-main killed before it had stopped" in said[1] and "store killed" in said[2]
    wait_for(lambda: not alive(inner), "the end of what the trainer had started")


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_one_ctrl_c_counts_once() -> None:
    """A wrapper may pass on what the terminal has sent already; a second one is a second one, and the first ends."""
    now = SimpleNamespace(at=0.0)
    interrupts = Interrupts(lambda: now.at)
    interrupts.check()
    for at, count in ((0.0, 1), (0.01, 1), (SAME_SECONDS, 2), (60.0, 3)):
        now.at = at
        interrupts.arrived(signal.SIGINT, None)
        assert interrupts.count == count
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()


def test_both_signals_are_counted_and_given_back() -> None:
    """SIGTERM and SIGINT reach the count, and the handlers from before are there again afterwards."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        with Interrupts() as interrupts:
            os.kill(os.getpid(), number)
            wait_for(lambda seen=interrupts: seen.count == 1, "the signal")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_progress_is_what_no_earlier_life_has_done() -> None:
    """A step, a warm-up or an evaluation that is repeated after a restart is none, nor is a batch that failed."""
    progress = Progress()
    main, again = "trainer:main/trainer-main#a1", "trainer:main/trainer-main#b2"
    assert part_of(main) == part_of(again) == "trainer-main"
    assert progress.take(main, "step", {"role": "main", "step": 1})
    assert progress.take(main, "step", {"role": "main", "step": 2})
    assert not progress.take(again, "step", {"role": "main", "step": 1})
    assert progress.take(again, "step", {"role": "main", "step": 3})
    assert progress.take("worker/rollout-0#c", "eval", {"split": "heldout", "step": 0})
    assert not progress.take("worker/rollout-0#d", "eval", {"split": "heldout", "step": 0})
    assert progress.take("worker/rollout-0#d", "rollouts", {"metrics": {"rollout/perf/tok_per_s": 7.0}})
    assert not progress.take("worker/rollout-0#d", "rollouts", {"metrics": {"rollout/perf/tok_per_s": 0.0}})
    assert not progress.take("worker/rollout-0#d", "phase", {"text": "here"})
