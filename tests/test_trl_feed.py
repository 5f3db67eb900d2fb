"""TRL's trainer on a feed takes the steps that our own trainer takes on the same minibatches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

import mgrpo  # noqa: E402
from mgrpo.config import load_config  # noqa: E402
from mgrpo.errors import ConfigError, NumericsError  # noqa: E402
from mgrpo.integrations import trl_agent  # noqa: E402
from mgrpo.model.loading import load_policy, load_reference  # noqa: E402
from mgrpo.model.policy import save_policy  # noqa: E402
from mgrpo.pipeline.feed import FeedStep  # noqa: E402
from mgrpo.trainers.batch import MicroBatch, MiniBatch  # noqa: E402
from mgrpo.trainers.torch.learner import new_learner  # noqa: E402
from mgrpo.trainers.torch.schedule import learning_rate  # noqa: E402
from tests import trl_cases as cases  # noqa: E402
from tests.models import tiny_policy  # noqa: E402
from tests.runs import ROOT  # noqa: E402

STEPS = 3


class Feed:
    """What AgentTrainer uses of mgrpo.feed, around steps made up from their numbers."""

    def __init__(self, folder: Path, *overrides: str, step: int = 0) -> None:
        self.start, self.folder, self.role = folder / "start", folder / "main", "main"
        if not self.start.exists():
            save_policy(tiny_policy("llama", 1), self.start)
            self.folder.mkdir()
        self.config = load_config(
            ROOT / "tests" / "alone.toml",
            [f"trainer.steps={STEPS}", "trainer.minibatches=2", "trainer.checkpoint_every=2", *overrides],
        )
        self.agent = self.config.agents["main"]
        self.step = self.saved_step = step
        self.calls: list[str] = []
        self.metrics: list[Mapping[str, float]] = []

    def __iter__(self) -> Iterator[FeedStep]:
        while self.step < STEPS:
            yield step_of(self, self.step)

    def applied(self, metrics: Mapping[str, float]) -> None:
        self.calls.append(f"applied {self.step}")
        self.metrics.append(metrics)
        self.step += 1

    def publish(self, model: torch.nn.Module) -> None:
        self.calls.append(f"publish {self.step}")

    def saved(self, step: int) -> None:
        self.calls.append(f"saved {step}")
        self.saved_step = step


def step_of(feed: Feed, number: int) -> FeedStep:
    """Two minibatches of two micro-batches; the second of step 1 can move nothing without a KL term. With one no row
    of step 0 is idle: its only gradient would be rounding, where the policy still is the reference, and AdamW would
    make whole steps of it."""
    idle = not feed.agent.loss.kl_coef
    g = torch.Generator().manual_seed(number)
    batches = [
        MiniBatch([micro(g, number == 1 and at == 1, idle, tokens=number == 2) for _ in range(2)], 7.5)
        for at in range(2)
    ]
    lr = learning_rate(feed.agent.optimizer, number, STEPS)
    recompute = feed.config.trainer.old_logprobs == "recompute"
    return FeedStep(number, lr, recompute, batches, [])


def micro(g: torch.Generator, dead: bool, idle: bool, tokens: bool) -> MicroBatch:
    rows, width = 3, 9
    lengths = torch.randint(4, width + 1, (rows,), generator=g)
    real = torch.arange(width) < lengths[:, None]
    mask = real & (torch.rand(rows, width, generator=g) < 0.7)
    mask[:, 0], mask[:, 2] = False, True
    advantages = torch.zeros(rows) if dead else torch.randn(rows, generator=g)
    if idle:
        advantages[1] = 0.0
    return MicroBatch(
        ids=torch.randint(3, 8, (rows, width), generator=g) * real,
        loss_mask=mask,
        rollout_logprobs=torch.where(mask, -2.0 - torch.rand(rows, width, generator=g), 0.0),
        lengths=lengths,
        advantages=advantages,
        weights=torch.tensor([1.0, 2.0, 0.5]),
        token_advantages=advantages[:, None] * torch.rand(rows, width, generator=g) if tokens else None,
    )


CASES = [
    [],
    ["agents.main.loss.kl_coef=0.1"],
    ["trainer.old_logprobs=recompute", "agents.main.optimizer.warmup_steps=2"],
    ["agents.main.loss.temperature=0.7", "agents.main.optimizer.weight_decay=0.1"],
]


@pytest.mark.parametrize("overrides", CASES, ids=lambda o: ",".join(o) or "plain")
def test_the_steps_are_those_of_our_trainer(tmp_path: Path, overrides: list[str]) -> None:
    """With the run's optimizer, three steps of two minibatches, one of them without an advantage: the weights agree to
    1e-5, every step is applied, published and, where it is due, saved, in this order, and its metrics are ours."""
    feed = Feed(tmp_path, *overrides)
    trainer: Any = trl_agent._FeedTrainer(feed, None, None, (None, None))
    trainer.train_agent()
    assert feed.calls == [
        *("applied 0", "publish 1", "applied 1", "publish 2", "saved 2", "applied 2", "publish 3", "saved 3")
    ]
    assert trainer.state.global_step == (6 if feed.agent.loss.kl_coef else 5)
    policy = load_policy(feed.start)
    reference = load_reference(policy, feed.start) if feed.agent.loss.kl_coef else None
    learner = new_learner(feed.agent, policy, reference)
    for number in range(STEPS):
        step = step_of(feed, number)
        ours = learner.train(step.minibatches, step.recompute_old, step.lr)
        for name, value in feed.metrics[number].items():
            assert value == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
    theirs = trainer.model.state_dict()
    start = load_policy(feed.start).model.state_dict()
    for name, weight in policy.model.state_dict().items():
        assert torch.allclose(weight, theirs[name], rtol=0, atol=1e-5), name
    assert max(float((theirs[n] - start[n]).abs().max()) for n in start) > 1e-3


def test_a_trainer_that_comes_back_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    """From the one of the step that the run knows, with its optimizer: the weights are those of a trainer that never
    stopped, bit for bit. Without that checkpoint it says where it looked."""
    whole: Any = trl_agent._FeedTrainer(Feed(tmp_path), None, None, (None, None))
    whole.train_agent()
    feed = Feed(tmp_path, step=2)
    again: Any = trl_agent._FeedTrainer(feed, None, None, (None, None))
    again.train_agent()
    assert feed.calls == ["publish 2", "applied 2", "publish 3", "saved 3"]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    lost: Any = trl_agent._FeedTrainer(Feed(tmp_path, step=1), None, None, (None, None))
    with pytest.raises(ConfigError, match=r"trl: no checkpoint of step 1"):
        lost.train_agent()


def test_numbers_that_are_not_finite_move_nothing(tmp_path: Path) -> None:
    """The error says what it is, and no step is applied."""
    feed = Feed(tmp_path)
    trainer: Any = trl_agent._FeedTrainer(feed, None, None, (None, None))
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[3] = torch.inf
    before = {n: w.clone() for n, w in trainer.model.state_dict().items()}
    with pytest.raises(NumericsError, match="the step was not taken"):
        trainer.train_agent()
    assert feed.calls == []
    assert all(torch.equal(w, before[n]) for n, w in trainer.model.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("dtype", "bfloat16"), ("routing_replay", "true")])
def test_what_our_own_trainer_alone_does_is_refused(tmp_path: Path, name: str, value: str) -> None:
    feed = Feed(tmp_path, f"agents.main.policy.{name}={value}")
    with pytest.raises(ConfigError, match=rf"(?i)agents\.main\.policy\.{name}: {value} cannot be honoured"):
        trl_agent._FeedTrainer(feed, cases.arguments(tmp_path), None, (None, None))


def test_what_the_page_says_to_type_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block of docs/embedding/trl.md, with bf16, TRL's optimizer and a cosine schedule, on these steps."""
    feed = Feed(tmp_path)

    @contextlib.contextmanager
    def opened(run: str, role: str, out: str, overrides: Sequence[str]) -> Iterator[Feed]:
        assert (run, role, out, overrides) == ("run.toml", "sub", "runs/a", ())
        yield feed

    monkeypatch.setattr(mgrpo, "feed", opened, raising=False)
    cases.on_the_cpu(monkeypatch)
    monkeypatch.chdir(tmp_path)
    exec(cases.blocks()[1], {})
    assert feed.calls[-2:] == ["publish 3", "saved 3"]
    assert sorted(path.name for path in Path("runs/a-trl").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-5",
    ]
    assert feed.metrics[-1]["policy/lr"] < feed.metrics[0]["policy/lr"]
