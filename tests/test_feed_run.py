"""Programs of the user's in a run: who may open a feed, how the launcher knows of them, and a whole run."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

import mgrpo
from mgrpo.cli.cluster.plan import Site, make_plan
from mgrpo.config import dump_config, load_config
from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.pipeline.external import SAVED
from mgrpo.pipeline.replay import UNKNOWN, Replayer
from mgrpo.run import external, launch
from mgrpo.run.external import ExternalTrainers, check_external
from mgrpo.run.folder import RunFolder
from mgrpo.view.top import RunStatus, _foot
from tests.runs import ALONE, DOOMED, ROOT, command, leftovers, started, train

EXTERNAL = 'agents.main.policy.trainer="external"'
LOOP = ROOT / "examples" / "embed_feed" / "train_sub.py"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agents.main.frozen=true"], r"agents\.main\.frozen = true with .*external"),
        (["agents.main.policy.last_layers=1"], r"agents\.main\.policy\.last_layers with"),
        (["agents.main.policy.lora.rank=2"], r"agents\.main\.policy\.lora with"),
        (
            ['agents.main.engine={type="vllm", sync="gloo", urls=["http://a:1"]}'],
            r"main\.engine\.sync .*straight",
        ),
    ],
)
def test_settings_that_a_program_does_not_go_by_are_refused(overrides: list[str], message: str) -> None:
    """Before anything runs."""
    others = load_config(ROOT / "tests" / "relay.toml", [EXTERNAL, *overrides])
    with pytest.raises(ConfigError, match=message):
        check_external(others)
    check_external(load_config(ALONE, [EXTERNAL]))


def test_a_feed_that_cannot_be_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles, trainers, folders and settings: one line each, and nothing is written."""
    monkeypatch.setattr(external, "START_SECONDS", 0.0)
    relay, out = ROOT / "tests" / "relay.toml", tmp_path / "out"
    shared = ["agents.right.shares=left", "agents.right.loss={}", 'agents.left.policy.trainer="external"']
    cases = [
        ("planner", [], r"feed of planner: unknown role; the run has main, left, right"),
        ("left", [], r'agents\.left\.policy\.trainer is "torch"; set it to "external"'),
        ("right", shared, r"feed of right: it shares a policy; take the feed of 'left'"),
        ("left", shared[2:], r"out: no run there; start it first: mgrpo train .*relay\.toml --out"),
    ]
    for role, overrides, message in cases:
        with pytest.raises(ConfigError, match=message), mgrpo.feed(relay, role, out, overrides):
            pass
    assert not out.exists()
    out.mkdir()
    dump_config(load_config(relay, shared[2:]), RunFolder(out).config)
    with pytest.raises(ConfigError, match=r"run -> yours\): trainer\.questions = 4 -> 8; give"):
        with mgrpo.feed(relay, "left", out, [*shared[2:], "trainer.questions=8"]):
            pass


def test_mgrpo_trainer_does_not_train_it() -> None:
    """`mgrpo trainer` for an external agent says whose it is."""
    from mgrpo.config import view_of
    from mgrpo.trainers.registry import check_trainer, find_trainer

    view = view_of(load_config(ALONE, [EXTERNAL]), "main")
    check_trainer(view)
    with pytest.raises(ConfigError, match=r"a program of yours trains it, through mgrpo\.feed"):
        find_trainer(view)


def test_what_knows_nothing_of_the_program_says_so() -> None:
    """A replay cannot take its steps, `mgrpo launch` cannot start it, `mgrpo top` names one that is not there."""
    config = load_config(ALONE, [EXTERNAL])
    nothing: Any = None
    stage = Replayer(config, nothing, nothing)._loss("main", 0, nothing)
    assert (stage.status, stage.field) == (UNKNOWN, "a program of the user's took the step")
    with pytest.raises(ConfigError, match=r"a program of yours trains it, through mgrpo\.feed"):
        make_plan(ALONE, [EXTERNAL], Site(Path("/run"), "python", None, None, 5600, 8))
    status = RunStatus(config)
    status.state, status.missing = "running", ["main"]
    assert "waiting for the external trainer of main; running" in _foot(status)


def test_a_program_that_does_not_come_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher says what it waits for, when it is there and when it is lost; time without the store is not held
    against it, and after store.idle_timeout without it the run ends."""
    clock = [0.0]
    monkeypatch.setattr(external, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = load_config(ALONE, [EXTERNAL, "store.idle_timeout=100", "store.heartbeat_timeout=20"])
    lines: list[str] = []
    watched = ExternalTrainers(config, RunFolder(Path("runs/a")), lines.append)
    watched.begin()
    for now, present in [
        (90, []),
        (95, None),
        (190, []),
        (191, ["main"]),
        (195, []),
        (196, ["main"]),
        (210, []),
    ]:
        clock[0] = now
        watched.look(present)
    assert [line.split(":")[0].split(";")[0] for line in lines] == [
        "the trainer of main is external",
        "the external trainer of main is there",
        "the external trainer of main is gone",
    ]
    assert all('mgrpo.feed("runs/a/config.json", "main", "runs/a")' in lines[n] for n in (0, 2))
    clock[0] = 297
    with pytest.raises(MgrpoError, match=r"trainer of main was not there for 100 s \(store\.idle_timeout\)"):
        watched.look([])


@pytest.mark.parametrize("impatient", [False, True])
def test_a_launcher_that_stops_lets_programs_save_first(
    impatient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store, which it ends last, says that the run stops; the launcher waits until they have left, or for
    another Ctrl-C."""
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.0)
    config, done = load_config(ALONE, [EXTERNAL]), []
    interrupts: Any = SimpleNamespace(count=1)
    there = iter([["main"], ["main"], [], []])

    def poll() -> None:
        monitor.trainers = next(there)
        interrupts.count += impatient
        done.append("poll")

    monitor: Any = SimpleNamespace(poll=poll, trainers=["main"], end=done.append)
    launched: Any = object.__new__(launch._Launch)
    launched._config = config
    externals = ExternalTrainers(config, RunFolder(Path("runs/a")), print)
    launched._release(externals, monitor, interrupts, None)
    assert done == []  # there was none
    externals.begin()
    externals.look(["main"])
    launched._release(externals, monitor, interrupts, None)
    assert done == ["the launcher stops", "poll"] + ([] if impatient else ["poll", "poll"])


def test_the_store_knows_who_is_there(tmp_path: Path) -> None:
    """Any request of a trainer is a sign of life, which lasts for heartbeat_timeout; leave() ends it at once."""
    from mgrpo.store import records as rec
    from mgrpo.store.core import Core
    from mgrpo.store.database import Database
    from mgrpo.transport.codec import Sender
    from tests.store_kit import DIGEST, run_params

    with closing(Database(tmp_path / "store.db")) as database:
        core = Core(database, 0.0)
        core.create(run_params(heartbeat_timeout_s=30.0), 0.0)
        trainer = Sender(DIGEST, "trainer:sub", "t", "s")

        def there(now: float) -> list[str]:
            found: rec.World = core.handle(
                "wait", rec.WaitFor(0.0), Sender(DIGEST, "observer", "o", "o"), now
            )
            return found.trainers

        assert there(0.0) == []
        core.handle("wait", rec.WaitFor(0.0), trainer, 1.0)
        assert there(30.0) == ["sub"] and there(31.5) == []
        core.handle("wait", rec.WaitFor(0.0), trainer, 40.0)
        core.handle("leave", rec.RoleName("sub"), trainer, 41.0)
        assert there(42.0) == []


# -- a whole run ---------------------------------------------------------------------------------------------------


def test_a_loop_in_plain_torch_ends_where_our_trainer_does(tmp_path: Path) -> None:
    """The example trains the only agent of a run. It is killed with a step applied and not saved; another program fails
    before its first step, and keeps a third one out meanwhile; the example is started again. Every group is trained on
    once in the history that counts, and the weights are our own trainer's."""
    sets = ["trainer.steps=4", "trainer.checkpoint_every=2", "eval.start_validation=0"]
    own, out, run = tmp_path / "own", tmp_path / "out", tmp_path / "run.toml"
    train(ALONE, own, *sets)
    text = ALONE.read_text().replace("[agents.main]", '[agents.main]\npolicy = { trainer = "external" }')
    text = text.replace("steps = 3", "steps = 9\ncheckpoint_every = 2")  # the launcher knows better
    run.write_text(text.replace("start_validation = 4", "start_validation = 0"))
    loop = [sys.executable, str(LOOP), str(run), "main", str(out)]
    with started(command("train", str(run), "--out", str(out), "--set=trainer.steps=4")) as launcher:
        with started([sys.executable, "-c", DOOMED, *loop[1:]]) as doomed:
            assert doomed.wait(300) == -signal.SIGKILL, doomed.stdout and doomed.stdout.read()
        with pytest.raises(KeyError), mgrpo.feed(out / "config.json", "main", out) as feed:
            assert feed.step == 2
            with pytest.raises(ConfigError, match=r"another process serves .* already trains this agent\?"):
                with mgrpo.feed(run, "main", out):
                    pass
            raise KeyError("an error of the program's own")
        with started(loop) as second:
            output = second.communicate(timeout=300)[0]
            assert second.returncode == 0, output
        output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, output
    assert "the trainer of main is external" in output and "main: a program trains it" in output
    assert "from step 2 on, 4 groups again" in output
    assert json.loads((out / "agents/main" / SAVED).read_text()) == {"step": 4}
    assert trained(out) == trained(own) and set(trained(out).values()) == {1}
    ours = load_file(own / "agents/main/final/model.safetensors")
    theirs = load_file(out / "agents/main/final/model.safetensors")
    start = load_file(out / "agents/main/start/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-5
    assert max(float((ours[n] - start[n]).abs().max()) for n in ours) > 1e-3
    assert leftovers(out) == []


def trained(out: Path) -> Counter[tuple[str, int]]:
    """How often each group was trained on, by group and step, in the history that counts."""
    import sqlite3

    with closing(sqlite3.connect(out / "store.db")) as database:
        return Counter(
            database.execute(
                "SELECT query, step FROM deliveries WHERE role = 'main' AND state IN ('applied', 'committed')"
            ).fetchall()
        )
