"""A program of the user's as one agent's trainer: the order of its calls, and what it may publish."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mgrpo.cli.comparison.variants import chosen
from mgrpo.config import load_config
from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.model.policy import save_policy
from mgrpo.pipeline.external import SAVED, ExternalFeed
from mgrpo.pipeline.feed import Feed
from mgrpo.trainers.batch import MiniBatch
from mgrpo.weights.publisher import WeightPublisher
from tests.models import tiny_model, tiny_policy
from tests.runs import ALONE, ROOT
from tests.test_step_ahead import Store, Stream

EXTERNAL = 'agents.main.policy.trainer="external"'


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
    check_events(store)
    assert store.reported[0]["main/loss/pg"] == 0.5
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "main" / "final", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(final.state_dict()[name], tensor), name


def check_events(store: Link) -> None:
    """Three steps, each applied, published, recorded and committed once, in this order."""
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


def test_the_loop_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of docs/embedding/feed.md, with what is the user's filled in."""
    monkeypatch.setattr("mgrpo.pipeline.feed.merge_streams", lambda batches: [MiniBatch([], 1.0)])
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/embedding/feed.md").read_text(), re.DOTALL)
    model, done, stores = tiny_model("llama", 2), [], []

    @contextmanager
    def page_feed(run: str, role: str, out: str) -> Iterator[ExternalFeed]:
        assert (run, role, out) == ("run.toml", "sub", "runs/one")
        with opened(tmp_path) as (feed, store):
            stores.append(store)
            yield feed
            store.state = "finished"
            feed.finish()

    yours = {
        "mgrpo": SimpleNamespace(feed=page_feed),
        "load": lambda start, step: (model, done.append(("load", step))),
        "train": lambda model, optimizer, lr, batch: {"loss/pg": lr},
        "save": lambda model, optimizer, step: done.append(("save", step)),
    }
    exec(block, yours)
    assert done == [("load", 0), ("save", 1), ("save", 2), ("save", 3)]
    check_events(stores[0])


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


def test_roles_that_share_the_policy_come_through_its_feed() -> None:
    """One step has the minibatches of both, and both parts of the store account for it."""
    overrides = ["agents.right.shares=left", "agents.right.loss={}", 'agents.left.policy.trainer="external"']
    config, stores = (
        load_config(ROOT / "tests" / "relay.toml", [*overrides, "trainer.steps=1"]),
        [Link(), Link()],
    )
    streams: list[Any] = [Stream(store) for store in stores]
    for stream, n in zip(streams, (2.0, 3.0), strict=True):
        stream.builder.assemble = lambda step, n=n: SimpleNamespace(
            step=step, groups=["a"], surplus=[], minibatches=[MiniBatch([], n)], plans=[], metrics={}
        )
    with Feed(config, "left", Path(), streams, WeightPublisher(torch.float32)) as feed:
        (batch,) = next(feed).minibatches
        assert batch.denominator == 5.0
        feed.applied({})
        feed.publish([("w", torch.zeros(2))])
        feed.commit(1, lambda cursors: cursors)
    for store in stores:
        assert [e for e in store.events if e[:4] in ("appl", "publ", "comm")] == [
            "apply 0",
            "publish 1",
            "commit 0",
        ]


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


def test_compare_starts_every_trainer_itself() -> None:
    """So it refuses one that it would wait for in vain."""
    config = load_config(ROOT / "tests" / "relay.toml", ['agents.left.policy.trainer="external"'])
    with pytest.raises(
        ConfigError, match=r'agents\.left\.policy\.trainer = "external": compare starts every'
    ):
        chosen(config, [])


def test_sharing_is_said_before_the_first_step(tmp_path: Path) -> None:
    """A program whose rows share what they begin with says so before anything is packed; nothing is shared until then,
    and afterwards it is too late."""
    with opened(tmp_path) as (feed, _):
        (stream,) = feed._streams
        assert not stream.builder.shares_prefixes
        feed.share_prefixes()
        assert stream.builder.shares_prefixes
        next(feed)
        with pytest.raises(ValueError, match=r"share_prefixes\(\) comes before the first step, step 0 is on"):
            feed.share_prefixes()
