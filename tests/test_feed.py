"""A program of the user's as one agent's trainer: the order of its calls, what it may publish, and a whole run."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mgrpo
from mgrpo.cli.cluster.plan import Site, make_plan
from mgrpo.config import dump_config, load_config
from mgrpo.errors import ConfigError, CorruptionError, MgrpoError
from mgrpo.model.policy import save_policy
from mgrpo.pipeline.external import SAVED, ExternalFeed
from mgrpo.pipeline.replay import UNKNOWN, Replayer
from mgrpo.run import external
from mgrpo.run.external import ExternalTrainers, check_external
from mgrpo.run.folder import RunFolder
from mgrpo.view.top import RunStatus, _foot
from mgrpo.weights.publisher import WeightPublisher
from tests.models import tiny_model, tiny_policy
from tests.runs import ROOT, command, leftovers, started, train
from tests.test_step_ahead import Store, Stream

ALONE = ROOT / "tests" / "alone.toml"
EXTERNAL = 'agents.main.policy.trainer="external"'
LOOP = ROOT / "examples" / "embed_feed" / "train_sub.py"


class Link(Store):
    """A store that resumes, and counts who leaves."""

    def resume(self, checkpoint_step: int) -> SimpleNamespace:
        self.events.append(f"resume {checkpoint_step}")
        return SimpleNamespace(requeued=0)

    def report(self, kind: str, payload: dict[str, object]) -> None:
        if kind == "step":
            super().report(kind, payload)

    def leave(self) -> None:
        self.events.append("leave")


@contextmanager
def opened(tmp_path: Path, kind: Any = "llama", steps: int = 3) -> Iterator[tuple[ExternalFeed, Link]]:
    """The feed of `main` in a run of `steps` steps, around a store that notes its calls. Its policy is tiny."""
    start, folder, store = tmp_path / "model", tmp_path / "main", Link()
    if not start.exists():
        save_policy(tiny_policy(kind, 1), start)
        folder.mkdir()
    config = load_config(ALONE, [EXTERNAL, f"agents.main.model={start}", f"trainer.steps={steps}"])
    stream: Any = Stream(store)
    stream.recorder.begin = lambda step: None
    stream.trajectory_log.segments = lambda: [1]
    with ExternalFeed(config, "main", folder, [stream], WeightPublisher(torch.float32)) as feed:
        feed.begin(SimpleNamespace(chat=False))  # type: ignore[arg-type]
        yield feed, store


# -- the order of calls --------------------------------------------------------------------------------------------


def test_a_loop_as_it_should_be(tmp_path: Path) -> None:
    """Every step is applied, published and saved once, in this order; the last one ends the loop, and what was
    published then is the final policy, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama", 2)
    with opened(tmp_path) as (feed, store):
        assert feed.start == tmp_path / "model" and feed.step == 0
        for step in feed:
            with torch.no_grad():
                next(model.parameters()).add_(1.0)
            feed.applied({"loss/pg": 0.5})
            feed.publish(model)
            feed.saved(step.number + 1)
        store.state = "finished"
        feed.finish()
    wanted = ["publish 0"]
    for step in range(3):
        wanted += [
            f"apply {step}",
            f"publish {step + 1}",
            f"record {step + 1}",
            f"step {step + 1}",
            f"commit {step}",
        ]
    assert [e for e in store.events if e.split()[0] not in ("resume", "leave", "close")] == wanted
    assert store.reported[0]["main/loss/pg"] == 0.5
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "main" / "final", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(final.state_dict()[name], tensor), name


def test_calls_out_of_order_are_refused_by_name(tmp_path: Path) -> None:
    """Whatever is called at the wrong moment says which step it was, and nothing is accounted for."""
    model = tiny_model("llama", 1)
    with opened(tmp_path) as (feed, store):
        with pytest.raises(ValueError, match=r"applied\(\) comes once a step, no step was taken"):
            feed.applied({})
        with pytest.raises(ValueError, match=r"saved\(1\): expected .* from 0 .* to 0"):
            feed.saved(1)
        next(feed)
        with pytest.raises(ValueError, match=r"publish\(\) of step 0 comes after applied\(\)"):
            feed.publish(model)
        with pytest.raises(ValueError, match=r"step 0 was taken without applied"):
            next(feed)
        with pytest.raises(ValueError, match=r"metric 'kl' of step 0 is nan"):
            feed.applied({"kl": math.nan})
        assert not [e for e in store.events if e.startswith("apply")] and feed.step == 0
        feed.applied({"kl": 0.0})
        with pytest.raises(ValueError, match=r"applied\(\) comes once a step, step 0 was applied"):
            feed.applied({"kl": 0.0})
        with pytest.raises(ValueError, match=r"step 0 was taken without publish"):
            next(feed)
        with pytest.raises(ValueError, match=r"saved\(7\): expected .* from 0 .* to 1"):
            feed.saved(7)
        feed.publish(model)
        feed.saved(1)
        next(feed)
        with pytest.raises(ValueError, match=r"saved\(0\): expected .* from 1"):
            feed.saved(0)
    assert [e for e in store.events if e.startswith("apply")] == ["apply 0"]
    assert not (tmp_path / "main" / "final").exists()


def test_what_was_saved_is_on_disk_before_the_store_hears_of_it(tmp_path: Path) -> None:
    """A program that is killed between the two goes on from the saved step; the store learns it then."""
    model = tiny_model("llama", 1)
    with opened(tmp_path) as (feed, store):
        for _ in range(2):
            next(feed)
            feed.applied({})
            feed.publish(model)

        def commit(step: int) -> int:
            assert json.loads((tmp_path / "main" / SAVED).read_text()) == {"step": 2}
            raise KeyboardInterrupt

        store.commit = commit  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            feed.saved(2)
    with opened(tmp_path) as (feed, store):
        assert feed.step == 2 and [e for e in store.events if e != "leave"] == ["resume 1", "commit 1"]
        with pytest.raises(ValueError, match=r"load your checkpoint of 2 steps .*feed\.publish"):
            next(feed)
        feed.publish(model)
        assert next(feed).number == 2
    (tmp_path / "main" / SAVED).write_text('{"step": 9}')
    with pytest.raises(CorruptionError, match=r"saved\.json: step is 9, expected 1 to 3"), opened(tmp_path):
        pass


def test_the_end_of_the_run_and_ctrl_c_end_the_loop(tmp_path: Path) -> None:
    """Between two steps, without an error; the program's own handler is back afterwards."""
    usual = signal.getsignal(signal.SIGINT)
    for stop in ("store", "signal"):
        with opened(tmp_path) as (feed, store):
            for step in feed:
                feed.applied({})
                feed.publish(tiny_model("llama", 1))
                if stop == "store":
                    store.state = "stopping"
                else:
                    os.kill(os.getpid(), signal.SIGINT)
                assert step.number == 0
            assert feed.stopped and feed.step == 1
            feed.finish()
        assert signal.getsignal(signal.SIGINT) is usual and store.events[-2:] == ["leave", "close"]
    assert not (tmp_path / "main" / "final").exists()


# -- weights -------------------------------------------------------------------------------------------------------


def test_weights_of_another_model_are_refused_and_the_version_before_stays(tmp_path: Path) -> None:
    """Names, shapes and completeness are those of the start policy, whatever the order."""
    state = dict(tiny_model("llama", 1).state_dict())
    first = next(iter(state))
    wrong = {
        r"have 'x', which the policy in .*model has not": {**state, "x": torch.zeros(1)},
        rf"have '{first}' in shape \(2, 2\), expected \(101, 32\)": {**state, first: torch.zeros(2, 2)},
        rf"lack '{first}' \(1 tensors are missing\)": {n: t for n, t in state.items() if n != first},
    }
    with opened(tmp_path) as (feed, store):
        for message, tensors in wrong.items():
            with pytest.raises(ValueError, match=message):
                feed.publish(tensors.items())
        with pytest.raises(ValueError, match=f"'{first}' twice"):
            feed.publish([*state.items(), (first, state[first])])
        with pytest.raises(ValueError, match="lack"):
            feed.publish([])
        with pytest.raises(ValueError, match="have 'weight'"):
            feed.publish(torch.nn.Linear(2, 2))
        feed.publish(reversed(state.items()))
        with pytest.raises(ValueError, match="weights of 0 steps were published already"):
            feed.publish(state.items())
        assert [e for e in store.events if e.startswith("publish")] == ["publish 0"]
        next(feed)
        feed.applied({})
        with pytest.raises(ValueError, match=r"weights of step 1 lack"):
            feed.publish([])
        feed.publish(state.items())


class Compiled(torch.nn.Module):
    """Where torch.compile keeps the model; importing that warns."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
def test_modules_around_the_model_are_seen_through(tmp_path: Path) -> None:
    """torch.compile, DataParallel, peft's adapters, tied weights that come twice: what arrives is the plain model."""
    peft = pytest.importorskip("peft")
    model = tiny_model("shift", 1)  # its head is its embedding
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with opened(tmp_path, "shift", 6) as (feed, _):

        def arrived(wrapped: Any) -> dict[str, torch.Tensor]:
            feed.publish(wrapped)
            next(feed)
            feed.applied({})
            (tmp_path / "newest").write_bytes(b"".join(feed._weights.newest()))
            return load_file(tmp_path / "newest")

        for wrapped in (model, Compiled(model), torch.nn.DataParallel(model), plain.items()):
            found = arrived(wrapped)
            assert all(torch.equal(tensor, plain[name]) for name, tensor in found.items())
            assert set(found) < set(plain)  # the head once
        layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n]
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers[:1]))
        layer = next(m for m in adapted.modules() if hasattr(m, "lora_B"))
        with torch.no_grad():
            layer.lora_B["default"].weight.add_(0.5)
        moved = [name for name, tensor in arrived(adapted).items() if not torch.equal(tensor, plain[name])]
        assert moved == [f"{layers[0]}.weight"]


# -- the launcher and the opener -----------------------------------------------------------------------------------


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

DOOMED = """
import os, runpy, signal, sys
from mgrpo.pipeline.feed import Feed
applied = Feed.applied
def doomed(self, metrics):
    applied(self, metrics)
    if self.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Feed.applied = doomed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
