"""From claimed groups to micro-batches: what the algorithm sees, where its numbers go, and a run with all kinds of
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgrpo.cli.replay import replay_run
from mgrpo.config import RunConfig, load_config
from mgrpo.pipeline.batch import BatchBuilder, StepBatch
from mgrpo.pipeline.replay import EQUAL, UNKNOWN
from mgrpo.pipeline.step_record import step_body
from mgrpo.record.reader import Recording
from mgrpo.record.schema import StepSettings
from mgrpo.store.records import ClaimedGroup, ClaimedInvocation, ClaimedRollout
from mgrpo.trajectory_log.format import LogRef
from mgrpo.types import Trajectory
from tests.runs import RELAY, train
from tests.test_replay import WORKER, replayer, rewrite

MASK = np.array([0, 1, 1, 0, 1], np.uint8)


class Tokens:
    """A trajectory log whose trajectories are told apart by their first token: the offset."""

    def read(self, ref: LogRef) -> Trajectory:
        tokens = np.full(len(MASK), ref.offset, np.int32)
        return Trajectory("", 0, "left", 0, tokens, MASK, -MASK.astype(np.float32), MASK.astype(np.int32) - 1)


def claimed(query: str, index: int, correct: dict[int, list[float]], failed: int) -> ClaimedGroup:
    """correct: rollout -> the expert scores of its calls; its outcome is 1 for odd rollouts. `failed` has no part."""
    rollouts, calls = [], []
    for k in range(4):
        if k == failed:
            rollouts.append(ClaimedRollout(k, "failed", 0.0, 0.0, {}, {}, -1, -1))
            continue
        d_k = {"left": len(correct[k]), "right": 0}
        rollouts.append(ClaimedRollout(k, "ok", 0.25 * k, float(k % 2), d_k, {}, 0, 0))
        for i, expert in enumerate(correct[k]):
            ref = LogRef("left", 0, 100 * index + 10 * k + i, len(MASK), 0)
            calls.append(ClaimedInvocation(k, i, len(MASK), 0, 0, {"format": 1.0, "expert": expert}, ref))
    return ClaimedGroup(query, index, 4, {}, 0, {}, {}, rollouts, calls, 0)


def groups() -> list[ClaimedGroup]:
    return [
        claimed("0/1", 1, {0: [0.0, 1.0, 0.5], 1: [1.0], 2: []}, failed=3),
        claimed("0/0", 0, {0: [0.5], 2: [0.5], 3: [0.5, 0.5]}, failed=1),
    ]


def build(*overrides: str, step: int = 0) -> tuple[RunConfig, StepBatch]:
    config = load_config(RELAY, ["trainer.questions=2", *overrides])
    return config, BatchBuilder(config, "left", Tokens(), ranks=1).build(step, groups())


def rows_of(batch: StepBatch) -> dict[int, dict[str, Any]]:
    """First token -> what the micro-batches hold of that trajectory."""
    found = {}
    for micro in (m for b in batch.minibatches for m in b.micro):
        for r in range(len(micro.lengths)):
            tokens = micro.token_advantages
            found[int(micro.ids[r, 0])] = {
                "advantage": float(micro.advantages[r]),
                "tokens": None if tokens is None else tokens[r].tolist(),
                "weight": float(micro.weights[r]),
            }
    return found


def test_one_number_a_trajectory_unless_the_algorithm_gives_more() -> None:
    """The default kind fills advantages (R,) and leaves token_advantages out."""
    _, batch = build("agents.left.algorithm.type=mgrpo")
    found = rows_of(batch)
    assert found and all(row["tokens"] is None and row["advantage"] != 0 for row in found.values())
    assert len(found) == sum(int(plan.rows.has_gradient.sum()) for plan in batch.plans)


def test_token_advantages_lie_on_their_tokens() -> None:
    """Padding and what was not sampled are 0; the row's own advantage is the mean over the sampled tokens; rows() and
    active() carry them."""
    _, batch = build("agents.left.algorithm={type='turn_credit',gamma=0.5}")
    micro = batch.minibatches[0].micro[0]
    tokens = micro.token_advantages
    assert tokens is not None and tokens.shape == micro.ids.shape
    assert not tokens[~micro.loss_mask].any() and tokens[micro.loss_mask].any()
    mean = (tokens * micro.loss_mask).sum(1) / micro.loss_mask.sum(1)
    torch.testing.assert_close(micro.advantages, mean)
    active = micro.active()
    assert active.token_advantages is not None
    assert (active.token_advantages == tokens[:, 1:][micro.loss_mask[:, 1:]]).all()
    assert active.to(torch.device("cpu")).token_advantages is not None
    keep = torch.arange(len(micro.lengths)) == 0
    kept = micro.rows(keep).token_advantages
    assert kept is not None and (kept == tokens[:1]).all()
    every = [row for b in batch.plans for row in b.rows.has_gradient.tolist()]
    assert batch.metrics["advantage/frac_zero"] == pytest.approx(1 - sum(every) / len(every))


def test_the_weights_an_algorithm_sees_are_those_the_batcher_trains_with() -> None:
    """The alignment is drawn once for the statistics and once for the rows: the same draw, whatever the step."""
    for step in range(8):
        _, batch = build(
            "agents.left.d_max=2", "agents.left.loss.kl_coef=0.1", "trainer.max_lag=7", step=step
        )
        kept = {
            int(batch.members[t].trajectory.tokens[0]): (float(w), float(a))
            for plan in batch.plans
            for t, w, a in zip(plan.rows.traj_id, plan.rows.weight, plan.rows.advantage, strict=True)
        }
        mine = {t: w for t, (w, _) in kept.items() if t >= 100}
        rewards = {
            int(m.trajectory.tokens[0]): m.reward for m in batch.members if int(m.trajectory.tokens[0]) >= 100
        }
        total = sum(mine.values())
        mean = sum(w * rewards[t] for t, w in mine.items()) / total
        std = (sum(w * (rewards[t] - mean) ** 2 for t, w in mine.items()) / total) ** 0.5
        assert (batch.mean[1], batch.std[1]) == pytest.approx((mean, std), rel=1e-12)
        for t in mine:
            assert kept[t][1] == pytest.approx((rewards[t] - mean) / (std + 1e-6), rel=1e-6)


def test_a_team_reward_is_what_the_store_delivers() -> None:
    """grpo pays each call its rollout's main reward, whatever its own scores say."""
    _, batch = build("agents.left.algorithm.type=grpo", "agents.left.loss.kl_coef=0.1")
    assert [m.reward for m in batch.members] == [0.25 * m.invocation.rollout for m in batch.members]
    found = rows_of(batch)
    assert found[30]["advantage"] == found[31]["advantage"] > 0 > found[0]["advantage"]


class Aged(Tokens):
    """Every trajectory's sampled tokens are of these versions."""

    def __init__(self, *versions: int) -> None:
        self._versions = np.full(len(MASK), -1, np.int32)
        self._versions[MASK != 0] = versions

    def read(self, ref: LogRef) -> Trajectory:
        trajectory = super().read(ref)
        trajectory.versions = self._versions
        return trajectory


def test_a_token_older_than_the_bound_is_refused() -> None:
    """Whatever admission and claims let through; after a rollback tokens of later versions are trained on."""
    config = load_config(RELAY, ["trainer.questions=2", "trainer.max_lag=2"])
    with pytest.raises(ValueError, match=r"0/0/0/left/0: .* version 3, 3 steps before step 6 .*max_lag is 2"):
        BatchBuilder(config, "left", Aged(4, 3, 5), ranks=1).build(6, groups())
    metrics = BatchBuilder(config, "left", Aged(4, 4, 8), ranks=1).build(6, groups()).metrics
    found = {name: metrics[f"staleness/{name}"] for name in ("mean", "max", "age", "mixed")}
    assert found == {"mean": pytest.approx(6 - 16 / 3), "max": 2, "age": 2, "mixed": 1}
    metrics = BatchBuilder(config, "left", Aged(9, 9, 9), ranks=1).build(6, groups()).metrics
    assert metrics["staleness/max"] == -3 and metrics["staleness/mixed"] == 0
    metrics = BatchBuilder(config, "left", Aged(-1, -1, -1), ranks=1).build(6, groups()).metrics
    assert metrics["staleness/mean"] == metrics["staleness/max"] == 0


def pool_of(*kinds: bool, first: int = 0) -> list[ClaimedGroup]:
    """Groups with calls in two rollouts of equal outcome; in those that are True one call is worth more."""
    return [
        claimed(f"0/{first + n}", first + n, {0: [0.5], 2: [1.0 if kind else 0.5], 3: []}, failed=1)
        for n, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("kinds", "chosen"),
    [
        ([False, True, False, True], [1, 3]),
        ([True, True, True, True], [0, 1]),
        ([False, False, True, False], [0, 2]),
        ([False, False, False, False], [0, 1]),
    ],
)
@pytest.mark.parametrize("algorithm", ["type='mgrpo'", "type='turn_credit',gamma=1"])
def test_informative_groups_of_a_pool_come_first(
    kinds: list[bool], chosen: list[int], algorithm: str
) -> None:
    """Then the others, each in order of their index; never fewer than a step needs. The order of a claim says nothing,
    and the same groups alone make the same batch."""
    config = load_config(
        RELAY,
        [
            "trainer.questions=2",
            "trainer.oversample=2",
            f"agents.left.algorithm={{{algorithm}}}",
            "agents.left.loss.kl_coef=0.1",
        ],
    )
    pool = pool_of(*kinds)
    batch = BatchBuilder(config, "left", Tokens(), ranks=1).build(0, pool[::-1])
    assert [g.index for g in batch.groups] == chosen
    assert [g.index for g in batch.surplus] == [n for n in range(4) if n not in chosen]
    assert batch.metrics["oversample/seen"] == 4 and batch.metrics["oversample/surplus"] == 2
    assert batch.metrics["oversample/informative"] == sum(kinds)
    alone = BatchBuilder(config, "left", Tokens(), ranks=1).build(0, [pool[n] for n in chosen])
    assert rows_of(alone) == rows_of(batch) and alone.surplus == []
    body, again = (step_body(b, {}, StepSettings(0.1, 1, 1)) for b in (batch, alone))
    assert (body.rows, body.minibatches, body.queries) == (again.rows, again.minibatches, again.queries)


def test_rewards_are_of_all_groups_that_were_seen() -> None:
    """reward/* is a fair sample, trained/reward/* what the step trains on; without a pool there is only the former."""
    config = load_config(RELAY, ["trainer.questions=2", "trainer.oversample=2"])
    builder = BatchBuilder(config, "left", Tokens(), ranks=1)
    metrics = builder.build(0, pool_of(False, True, False, True)).metrics
    assert metrics["reward/expert"] == pytest.approx(5 / 8)
    assert metrics["trained/reward/expert"] == pytest.approx(3 / 4)
    assert metrics["rollouts/failed"] == 4
    usual = builder.build(0, pool_of(False, True)).metrics
    assert not [name for name in usual if name.startswith(("trained/", "oversample/"))]


OUTSIDE = """
import numpy as np
from mgrpo.algorithms import Algorithm

class Ladder(Algorithm):
    def reward(self, scores, rollout):
        return 2.0 * rollout.correct

    def advantages(self, groups):
        return [[self.settings["step"] * m.rollout.rollout + m.reward for m in g.members] for g in groups]

class Lost(Ladder):
    def reward(self, scores, rollout):
        return float("nan") if rollout.rollout == 2 else 0.0

class Forgetful(Algorithm):
    def advantages(self, groups):
        return [[0.0 for m in g.members[1:]] for g in groups]
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of somebody else's, on the path of this process and of its children."""
    (tmp_path / "their_algorithms.py").write_text(OUTSIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "their_algorithms"


def test_an_algorithm_that_forgets_a_trajectory_is_named(outside: str) -> None:
    """Numbers for other trajectories than there are end the step with the class and both counts."""
    with pytest.raises(
        ValueError, match=r"Forgetful.advantages\(\) gave \[3, 3\] numbers for groups of \[4, 4\]"
    ):
        build(f"agents.left.algorithm.type={outside}:Forgetful", "trainer.minibatches=1")


def test_a_reward_that_is_no_number_is_named(outside: str) -> None:
    """Query, rollout, role and invocation stand in the error, before anything is computed from it."""
    with pytest.raises(ValueError, match=r"0/0/2/left/0: reward nan is not within \+-1.70141e\+38"):
        build(f"agents.left.algorithm={{type='{outside}:Lost',options={{step=1}}}}")


def test_a_run_trains_and_replays_with_every_form_of_algorithm(
    outside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A team reward, credit by turns and a class from outside in one run of three steps: the recorded rewards and
    advantages are the class's own, and all three roles replay bit for bit."""
    out = tmp_path / "run"
    ladder = "agents.right.algorithm={type='their_algorithms:Ladder',options={step=0.5}}"
    kinds = ("agents.main.algorithm.type=grpo", "agents.left.algorithm.type=turn_credit", ladder)
    train(RELAY, out, "trainer.steps=3", "trainer.checkpoint_every=1", "eval.every=3", *kinds)
    recording, seen = Recording([out]), 0
    for (role, _), step in recording.steps.items():
        body = step.body()
        per_token = ["token_advantages" in m.crc for m in body.minibatches if m.crc["ids"]]
        assert per_token == [role == "left"] * len(per_token)
        if role == "right":
            for row in body.table():
                assert row["reward"] == 2 * row["correct"]
                if row["multiplicity"]:
                    assert row["advantage"] == np.float32(0.5 * row["rollout"] + row["reward"])
                    seen += 1
    assert seen > 5
    replay_run(out, [], sample=10, seed=0)
    assert capsys.readouterr().out.splitlines()[-1] == "10 rollouts: every stage bit-equal"

    def forget(head: object, body: object) -> None:
        for trajectory in getattr(body, "trajectories", ()):
            trajectory.tokens = b""

    rewrite(out, WORKER, forget)
    trained = next(
        r.head for r in recording.rollouts.values() if r.head.split == "train" and r.head.d_k["left"]
    )
    found = {s.role: s.status for s in replayer(out).replay(trained.id) if s.name == "advantage"}
    assert found == {"main": EQUAL, "left": UNKNOWN, "right": EQUAL}  # credit by turns reads the tokens
