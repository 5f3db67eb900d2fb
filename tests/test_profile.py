"""[profile]: a profiler sees the stages of the steps that it is to see, changes nothing, and never ends a run."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mgrpo.config import check_same_run, config_digest, load_config
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.profile import MAX_STEPS, ProfileConfig
from mgrpo.config.record import RecordConfig
from mgrpo.errors import ConfigError
from mgrpo.profiling import stages, tools, window
from mgrpo.profiling.stages import stage
from mgrpo.profiling.window import ProfileWindow, profiling
from mgrpo.record import spans
from mgrpo.record.span_reader import SpanReader
from mgrpo.run import launch, processes
from mgrpo.run.folder import RunFolder
from mgrpo.run.nsys import INSIDE, OPTIONS, check_nsys
from mgrpo.run.supervisor import STOP_SECONDS
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.learner import Learner, adamw
from tests.models import tiny_policy
from tests.rows import ROWS, rows_of
from tests.runs import RELAY, ROOT, started, wait_for

KL = {"type": "grpo", "kl_coef": 0.1}


def minibatch(seed: int, parts: int) -> MiniBatch:
    rows = rows_of(seed, near=True)
    micro = [rows.rows(torch.arange(ROWS) % parts == i) for i in range(parts)]
    return MiniBatch(micro, float(rows.weights.sum()))


def trained(folder: Path, config: ProfileConfig, lines: list[str]) -> list[torch.Tensor]:
    """Three RL steps of two minibatches of two micro-batches each; the weights after them."""
    torch.set_num_threads(1)
    policy, loss = tiny_policy("llama"), GrpoLossConfig.model_validate(KL)
    learner = Learner(policy, adamw(policy, 1e-2), loss, 1.0, tiny_policy("llama", 1))
    with profiling(config, "main-rank0", folder):
        for step in (1, 2, 3):
            window.begin_step(step, lines.append)
            learner.train([minibatch(step, 2), minibatch(step + 10, 2)], recompute_old=True)
            window.end_step(step)
    return [parameter.detach().clone() for parameter in policy.parameters()]


def idle(folder: Path, config: ProfileConfig) -> list[str]:
    """Three RL steps with one stage each, in which nothing is done; the lines for people."""
    lines: list[str] = []
    with profiling(config, "main-rank0", folder):
        for step in (1, 2, 3):
            window.begin_step(step, lines.append)
            with stage("forward"), stages.mark("inner"):
                pass
            window.end_step(step)
    return lines


def ranges_of(trace: Path) -> Counter[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return Counter(e["name"] for e in events if e.get("cat") == "user_annotation" and "mgrpo/" in e["name"])


def test_a_trace_holds_the_stages_of_its_steps_and_changes_no_bit(tmp_path: Path) -> None:
    """Each micro-batch has its forward, reference, head and backward pass, each minibatch its clip and update, each of
    the two steps looked at its recomputed log-probs; weights are those without a profiler, bit for bit."""
    lines: list[str] = []
    found = trained(tmp_path / "profile", ProfileConfig(steps=(2, 3)), lines)
    plain = trained(tmp_path / "none", ProfileConfig(), lines)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)) and found
    assert not (tmp_path / "none").exists()
    trace = tmp_path / "profile" / "main-rank0-steps-2-3.json.gz"
    micro = dict.fromkeys(("forward", "reference", "head", "backward"), 2 * 2 * 2)
    steps = dict.fromkeys(("clip", "optimizer"), 2 * 2) | {"recompute": 2}
    assert ranges_of(trace) == {f"mgrpo/{name}": n for name, n in (micro | steps).items()}
    table = trace.parent / "main-rank0-steps-2-3.txt"
    text = table.read_text()
    counts = {
        line.split()[0]: int(line.split()[1]) for line in text.splitlines() if line.startswith("mgrpo/")
    }
    assert counts["mgrpo/backward"] == 8 and counts["mgrpo/recompute"] == 2 and "aten::mm" in text
    assert {path.name for path in trace.parent.iterdir()} == {trace.name, table.name}  # nothing half written
    assert len(lines) == 1 and str(trace) in lines[0] and table.name in lines[0]


def test_stages_are_spans_with_and_without_a_profiler(tmp_path: Path) -> None:
    """Where nobody looks a stage is the same object each time, which does nothing."""
    assert stage("forward") is stage("head") is stages.mark("decode")
    log = spans.SpanLog(RecordConfig(), tmp_path / "agents" / "main" / "record", "trainer main", print)
    spans.record_to(log)
    shown: list[str] = []
    try:
        with stage("forward"):
            pass
        stages.show_to(lambda name: nullcontext(shown.append(name)))  # type: ignore[func-returns-value]
        with stage("head"), stages.mark("publish"):
            pass
    finally:
        stages.show_to(None)
        spans.record_to(None)
        log.close()
    (kept,) = SpanReader([tmp_path]).spans().values()
    assert [(s.kind, s.name, s.lane) for s in kept] == [
        ("stage", "forward", "main"),
        ("stage", "head", "main"),
    ]
    assert shown == ["mgrpo/head", "mgrpo/publish"]


class Recorded(tools.Profiler):
    """A profiler that notes what is done with it; `fails` at start or stop."""

    def __init__(self, calls: list[str], fails: str = "", error: type[Exception] = OSError) -> None:
        self._calls, self._fails, self._error = calls, fails, error

    def start(self) -> None:
        self._note("start")

    def stop(self, folder: Path, name: str) -> str:
        self._note(f"stop {name}")
        return "written"

    def _note(self, call: str) -> None:
        self._calls.append(call)
        if self._fails and call.startswith(self._fails):
            raise self._error("No space left on device")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(tools, "open_profiler", lambda config: Recorded(found))
    return found


def seen(folder: Path, steps: Sequence[int], **more: Any) -> ProfileWindow:
    """A window over the steps 3 to 5, after these steps of a process."""
    opened = ProfileWindow(ProfileConfig(steps=(3, 5)), "main-rank0", folder, **more)
    for step in steps:
        opened.begin(step, print)
        opened.end(step)
    return opened


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 9), "3-5"),
        (range(4, 9), "4-5"),  # resumed inside
        (range(1, 4), "3-3"),  # ended inside
        ((1, 2, 4, 7), "4-4"),  # a worker that has not seen every version
    ],
)
def test_a_window_opens_once_and_closes_after_its_last_step(
    tmp_path: Path, calls: list[str], steps: Sequence[int], expected: str
) -> None:
    """The file is named after the steps that were seen; what is open at the end is written."""
    seen(tmp_path, steps).close()
    assert calls == ["start", f"stop main-rank0-steps-{expected}"]


def test_a_process_outside_of_the_range_starts_nothing(tmp_path: Path, calls: list[str]) -> None:
    """A run that is resumed after the range, and a rank that only knows when others look."""
    seen(tmp_path, range(6, 9)).close()
    seen(tmp_path, range(1, 9), looks=False).close()
    assert calls == [] and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_starts_nothing(tmp_path: Path, calls: list[str]) -> None:
    """A profiler that could not write would run to the end of the run, and keep every event of it."""
    (tmp_path / "profile").write_text("")
    seen(tmp_path / "profile", range(1, 9)).close()
    assert calls == []


@pytest.mark.parametrize("error", [OSError, AssertionError])
@pytest.mark.parametrize(("fails", "expected"), [("start", "not profiled"), ("stop", "not written")])
def test_a_full_disk_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, expected: str, error: type[Exception]
) -> None:
    """Or whatever a library raises: nothing is raised here, one line says why, and stages are shown to nobody
    afterwards."""
    lines: list[str] = []
    monkeypatch.setattr(tools, "open_profiler", lambda config: Recorded([], fails, error))
    opened = ProfileWindow(ProfileConfig(steps=(1, 2)), "main-rank0", tmp_path)
    for step in (1, 2, 3):
        opened.begin(step, lines.append)
        opened.end(step)
    assert len(lines) == 1 and expected in lines[0] and "No space left" in lines[0]
    assert stage("forward") is stage("head")


def test_a_trace_that_torch_could_not_finish_is_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says nothing when the disk is full: the file just ends."""
    monkeypatch.setattr(
        torch.profiler.profile, "export_chrome_trace", lambda self, path: Path(path).write_text('{"traceEv')
    )
    lines = idle(tmp_path, ProfileConfig(steps=(1, 1)))
    assert len(lines) == 1 and "not written to its end" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_memory_history_is_written_and_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's functions replaced, since there is no GPU; off also where the file cannot be written."""
    told: list[object] = []
    full = False

    def dump(path: str) -> None:
        if full:
            raise OSError(28, "No space left on device")
        Path(path).write_bytes(b"snapshot")

    memory = SimpleNamespace(_record_memory_history=lambda **how: told.append(how), _dump_snapshot=dump)
    monkeypatch.setattr(torch.cuda, "memory", memory)
    on, off = {"max_entries": tools.ALLOCATIONS}, {"enabled": None}
    for full in (False, True):
        lines = idle(tmp_path / str(full), ProfileConfig(steps=(1, 2), tool="memory"))
        written = [path.name for path in (tmp_path / str(full)).iterdir()]
        assert written == ([] if full else ["main-rank0-steps-1-2.pickle"])
        assert told == [on, off] and len(lines) == 1
        assert ("No space left" if full else tools.MEMORY_VIEW) in lines[0]
        told.clear()


def test_nsys_sees_its_range_and_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVTX ranges nest, and all of them lie between start and stop."""
    told: list[str] = []
    nvtx = SimpleNamespace(range_push=told.append, range_pop=lambda: told.append("pop"))
    profiler = SimpleNamespace(start=lambda: told.append("start"), stop=lambda: told.append("stop"))
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    monkeypatch.setattr(torch.cuda, "profiler", profiler)
    idle(tmp_path, ProfileConfig(steps=(2, 3), tool="nsys"))
    step = ["mgrpo/forward", "mgrpo/inner", "pop", "pop"]
    assert told == ["start", *step, *step, "stop"]


# -- the config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["profile.steps=[3, 2]"], "steps=[3, 2]: expected the first step"),
        (["profile.steps=[0, 2]"], "steps=[0, 2]: expected the first step"),
        ([f"profile.steps=[1, {MAX_STEPS + 1}]"], f"at most {MAX_STEPS}"),
        (["profile.steps=[3, 21]"], "the last step is 20 (trainer.steps)"),
        (["profile.steps=[3]"], "profile.steps"),
        (
            ["profile.steps=[1, 2]", "profile.ranks=[0, 1]"],
            "rank 1 does not exist; policy.ranks is at most 1",
        ),
        (
            ["profile.steps=[1, 2]", 'profile.roles=["nobody"]'],
            "no policy of 'nobody', but main, left, right",
        ),
        (
            ["profile.steps=[1, 2]", 'profile.roles=["left"]', "agents.left.frozen=true"],
            "no policy of 'left', but main, right",
        ),
        (["profile.steps=[1, 2]", "profile.workers=[1]"], "worker 1 does not exist; rollout.workers is 1"),
        (["profile.steps=[1, 2]", "profile.ranks=[]"], "ranks and workers are both empty"),
        (["profile.steps=[1, 2]", "profile.tool=memory"], 'agents.main.policy.device is "cpu"'),
        (["profile.steps=[1, 2]", "profile.tool=nsys"], 'agents.main.policy.device is "cpu"'),
        (
            ["profile.steps=[1, 2]", "profile.tool=nsys", "profile.ranks=[]", "profile.workers=[0]"],
            "the workers have no engine on one",
        ),
        (["profile.tool=memory", "profile.with_stack=true"], 'with_stack has no effect with tool "memory"'),
        (["profile.step=[1, 2]"], "profile.step: unknown key"),
    ],
)
def test_a_profile_that_a_run_cannot_have_is_named(overrides: list[str], message: str) -> None:
    """Before anything is started."""
    with pytest.raises(ConfigError) as error:
        load_config(RELAY, overrides)
    assert message in str(error.value)


def test_a_profile_is_no_part_of_what_a_run_computes() -> None:
    """It may be switched on, changed and off in a run that has begun."""
    plain = load_config(RELAY)
    profiled = load_config(RELAY, ["profile.steps=[2, 3]", 'profile.roles=["left"]', "profile.workers=[0]"])
    assert config_digest(plain) == config_digest(profiled)
    check_same_run(plain, profiled)
    assert [profiled.profile.looks_at_trainer(role) for role in ("main", "left")] == [False, True]
    assert not plain.profile.looks_at_trainer("main")


# -- nsys --------------------------------------------------------------------------------------------------------------

NSYS = """#!{python}
import json, subprocess, sys
from pathlib import Path
number = next(i for i, word in enumerate(sys.argv[2:], 2) if not word.startswith("-"))
Path("{folder}/options").write_text(json.dumps(sys.argv[1:number]))
sys.exit(subprocess.call(sys.argv[number:]))
"""
OUTER = """
import sys
from pathlib import Path
from mgrpo.run.nsys import is_inside, run_under_nsys
assert not is_inside()
run_under_nsys("trainer-main", [sys.executable, *sys.argv[2:]], Path(sys.argv[1]))
"""
WORK = """
import signal, sys, time
from pathlib import Path
from mgrpo.run import nsys
nsys.ALIVE_SECONDS = 0.05
folder, status = Path(sys.argv[1]), int(sys.argv[2])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with nsys.inside_nsys():
    (folder / "began").touch()
    while not stop and not (folder / "end").exists():
        time.sleep(0.02)
(folder / ("stopped" if stop else "ended")).touch()
sys.exit(status)
"""


@pytest.fixture
def under_nsys(tmp_path: Path) -> Callable[[int], AbstractContextManager[subprocess.Popen[str]]]:
    """Starts a process that runs its work under a stand-in for nsys, which notes its options, runs the command as a
    child and ends with its status. The work ends with the given status once it is told to stop or there is a file
    "end"."""
    program, outer, work = (tmp_path / name for name in ("bin/nsys", "outer.py", "work.py"))
    program.parent.mkdir()
    program.write_text(NSYS.format(python=sys.executable, folder=tmp_path))
    program.chmod(0o755)
    outer.write_text(OUTER)
    work.write_text(WORK)
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def start(status: int) -> AbstractContextManager[subprocess.Popen[str]]:
        arguments = [str(part) for part in (outer, tmp_path / "profile", work, tmp_path, status)]
        return started([sys.executable, *arguments], environment)

    return start


def test_work_under_nsys_ends_with_its_status(tmp_path: Path, under_nsys: Callable[[int], Any]) -> None:
    """Status 2, a mistake in the config, ends a run; nsys gets its range, and the file where the others lie."""
    (tmp_path / "end").touch()
    with under_nsys(2) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    options = json.loads((tmp_path / "options").read_text())
    assert options == ["profile", *OPTIONS, f"--output={tmp_path / 'profile' / 'trainer-main'}"]
    assert (tmp_path / "ended").exists() and list((tmp_path / "profile").iterdir()) == []


def test_a_stop_reaches_the_work_through_nsys(tmp_path: Path, under_nsys: Callable[[int], Any]) -> None:
    """It writes its checkpoint, and only then nsys ends, and the process that the launcher knows."""
    with under_nsys(0) as process:
        wait_for(lambda: (tmp_path / "began").exists() or process.poll() is not None, "the work")
        process.terminate()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / "stopped").exists(), output


def test_work_under_nsys_stops_when_nobody_could_stop_it(
    tmp_path: Path, under_nsys: Callable[[int], Any]
) -> None:
    """kill -9 of the process that the launcher knows: a trainer left alone would hold the agent's address."""
    with under_nsys(0) as process:
        wait_for(lambda: (tmp_path / "began").exists() or process.poll() is not None, "the work")
        process.kill()
        wait_for(lambda: (tmp_path / "stopped").exists(), "the end of the work")


def test_a_worker_that_is_stopped_has_time_to_write_its_profile(tmp_path: Path) -> None:
    """Those that are not looked at have nothing to save, and the usual seconds."""
    config = load_config(RELAY, ["profile.steps=[2, 3]", "profile.workers=[1]", "rollout.workers=2"])
    found: dict[str, tuple[float, str]] = {}

    def start(name: str, *_: object, stop_seconds: float, saves: str) -> None:
        found[name] = stop_seconds, saves

    start_others: Any = launch._Launch._start_others
    start_others(SimpleNamespace(_config=config, _folder=RunFolder(tmp_path)), SimpleNamespace(start=start))
    assert found["rollout-0"] == (STOP_SECONDS, "")
    assert found["rollout-1"] == (launch.PROFILE_SECONDS, "write its profile")


def test_a_machine_without_nsys_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a folder or a process exists, and only where nsys is asked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    check_nsys(ProfileConfig(steps=(1, 2)))
    check_nsys(ProfileConfig(tool="nsys"))
    with pytest.raises(ConfigError, match="install NVIDIA Nsight Systems"):
        check_nsys(ProfileConfig(steps=(1, 2), tool="nsys"))


def test_what_profile_names_goes_under_nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer by the name of its log; nothing else, and nothing that is inside already."""
    found: dict[str, Sequence[str]] = {}
    monkeypatch.setattr(processes, "check_nsys", lambda profile: None)
    monkeypatch.setattr(
        processes, "run_under_nsys", lambda name, command, folder: found.update({name: command})
    )
    plain = load_config(RELAY)
    config = plain.model_copy(update={"profile": ProfileConfig(steps=(1, 2), tool="nsys", roles=("left",))})
    for chosen in (plain, config):
        for role in chosen.roles:
            looks, part = chosen.profile.looks_at_trainer(role), ["trainer", "run.toml", "--agent", role]
            processes._under_nsys(chosen, f"trainer-{role}", part, RunFolder(tmp_path), looks)
    assert {name: list(command)[1:] for name, command in found.items()} == {
        "trainer-left": ["-m", "mgrpo", "trainer", "run.toml", "--agent", "left"]
    }
    found.clear()
    monkeypatch.setenv(INSIDE, f"{os.getpid()}:{tmp_path / 'note'}")
    processes._under_nsys(config, "trainer-left", [], RunFolder(tmp_path), profiled=True)
    assert found == {}
