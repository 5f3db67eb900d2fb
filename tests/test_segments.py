"""Segments from the conversation to the gradient: one trajectory, one vote, however often its context was rewritten."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import mgrpo
from mgrpo.algorithms import GroupMember, GroupRollout, RolloutGroup, open_algorithm
from mgrpo.cli.replay import replay_run
from mgrpo.config import RunConfig, load_config
from mgrpo.config.record import RecordConfig
from mgrpo.integrations import slime
from mgrpo.losses.registry import find_loss
from mgrpo.pipeline.batch import BatchBuilder, StepBatch
from mgrpo.pipeline.step_record import step_body
from mgrpo.record.reader import Recording
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.record.schema import StepSettings, TrajectoryRecord
from mgrpo.store.records import ClaimedGroup, ClaimedInvocation, ClaimedRollout
from mgrpo.trainers.torch.learner import Learner
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.trajectory_log.format import Append, LogRef, Meta, checked_payload, trajectory
from mgrpo.trajectory_log.log import TrajectoryLog
from mgrpo.transport import codec
from mgrpo.transport.codec import BadMessage
from mgrpo.transport.server import Server
from mgrpo.types import Rollout, Trajectory
from mgrpo.view.data import RunView, Texts
from tests.models import VOCAB, tiny_policy
from tests.runs import RELAY, train
from tests.store_kit import DIGEST, same

K = 4
SETTINGS = StepSettings(0.1, 1, 1)


def talk(role: str, rollout: int, invocation: int, lengths: Sequence[int], seed: int) -> Trajectory:
    """A conversation of segments of so many tokens, each of which begins with two of context."""
    r = np.random.default_rng([seed, rollout, invocation])
    n = sum(lengths)
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    mask = (r.random(n) < 0.7).astype(np.uint8)
    for start, length in zip(starts, lengths, strict=True):
        mask[start : start + 2], mask[start + length - 1] = 0, 1
    return Trajectory(
        query="", rollout=rollout, role=role, invocation=invocation,
        tokens=r.integers(0, VOCAB, n).astype(np.int32), loss_mask=mask,
        logprobs=((-4 - r.random(n)) * mask).astype(np.float32), versions=np.where(mask, 0, -1).astype(np.int32),
        segment_starts=tuple(starts),
    )  # fmt: skip


class Log:
    """A trajectory log of what is put into it."""

    def __init__(self) -> None:
        self.held: list[Trajectory] = []

    def put(self, given: Trajectory) -> LogRef:
        self.held.append(given)
        return LogRef(given.role, 0, len(self.held) - 1, len(given), 0)

    def read(self, ref: LogRef) -> Trajectory:
        return self.held[ref.offset]


def group(role: str, index: int, log: Log, *, compact: bool = True) -> ClaimedGroup:
    """K rollouts; the first conversation of rollout 1 compacts twice: it has three segments. The sub-agent is called
    3, 1, 0 and 2 times."""
    query, rollouts, calls = f"0/{index}", [], []
    for k in range(K):
        d = 1 if role == "main" else (3, 1, 0, 2)[k]
        rollouts.append(ClaimedRollout(k, "ok", 0.25 * k, float(k % 2), {"left": d, "right": 0}, {}, 0, 0))
        for i in range(d):
            lengths = [9, 6, 11] if compact and (k, i) == (1, 0) else [8 + 3 * i + k]
            ref = log.put(talk(role, k, i, lengths, index))
            scores = {"format": 1.0} | ({} if role == "main" else {"expert": (0.0, 1.0, 0.5)[i]})
            calls.append(ClaimedInvocation(k, i, sum(lengths), 0, 0, scores, ref))
    return ClaimedGroup(query, index, K, {}, 0, {}, {}, rollouts, calls, 0)


def built(role: str, *overrides: str, compact: bool = True) -> tuple[RunConfig, StepBatch]:
    config = load_config(RELAY, ["trainer.questions=2", "trainer.minibatches=1", *overrides])
    log = Log()
    groups = [group(role, index, log, compact=compact and index == 0) for index in range(2)]
    return config, BatchBuilder(config, role, log, ranks=1).build(0, groups)


def expected(
    config: RunConfig, role: str, batch: StepBatch, model: Any
) -> tuple[torch.Tensor, float, dict[tuple[str, int, int], tuple[float, float]]]:
    """The formula in float64, segment by segment: the loss, what it is divided by, and (w, A) of each trajectory."""
    loss, alignment, d_max = (
        config.agents[role].loss,
        config.agents[role].alignment,
        config.agents[role].d_max,
    )
    total, rows, rollouts = torch.zeros((), dtype=torch.float64), 0.0, 0
    seen = {}
    sequence_mean = find_loss(loss).sequence_mean
    for number, claimed in enumerate(batch.groups):
        mine = [m for m in batch.members if m.group == number]
        counts = np.bincount([m.invocation.rollout for m in mine], minlength=K).tolist()
        aligned = mgrpo.align(
            counts, d_max=d_max, seed=config.seed, step=0, query=claimed.query, role=role, mode=alignment.mode,
            sequence_weight=alignment.sequence_weight,
        )  # fmt: skip
        places = zip(aligned.rollout.tolist(), aligned.invocation.tolist(), strict=True)
        w = dict(zip(places, aligned.weight.tolist(), strict=True))
        rollouts += sum(d > 0 for d in counts)
        kept = [m for m in mine if (m.invocation.rollout, m.invocation.invocation) in w]
        weight = np.array([w[m.invocation.rollout, m.invocation.invocation] for m in kept])
        reward = np.array([m.reward for m in kept])
        mean = (weight * reward).sum() / weight.sum()
        std = np.sqrt((weight * (reward - mean) ** 2).sum() / weight.sum())
        for m, w_ki, r in zip(kept, weight, reward, strict=True):
            a, t = float((r - mean) / (std + 1e-6)), m.trajectory
            seen[claimed.query, t.rollout, t.invocation] = (w_ki, a)
            for place in t.segments():
                tokens = torch.from_numpy(t.tokens[place].astype(np.int64))
                logits = model(input_ids=tokens[None]).logits[0]
                logp = torch.log_softmax(logits[:-1], -1).gather(-1, tokens[1:, None])[:, 0]
                active = torch.from_numpy(t.loss_mask[place][1:] != 0)
                old = torch.from_numpy(t.logprobs[place][1:].astype(np.float64))
                ratio = (logp - old).exp()
                clipped = ratio.clamp(1 - loss.clip_eps_low, 1 + loss.clip_eps_high)
                terms = torch.minimum(ratio * a, clipped * a)[active]
                share = w_ki / len(t.segments())
                total = total - share * (terms.mean() if sequence_mean else terms.sum())
                rows += share * int(active.sum())
    return total, float(rollouts) if sequence_mean else rows, seen


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
@pytest.mark.parametrize("mode", ["weights", "none", "expected"])
@pytest.mark.parametrize("role", ["main", "left"])
def test_the_gradient_is_the_formulas(role: str, mode: str, loss: str) -> None:
    """A conversation that compacts twice among others that do not: rows, weights, denominator and gradient are those of
    loss = 1/D sum w/S 1/|o_s| sum term(A), written out in float64 over each segment alone."""
    config, batch = built(role, f"agents.{role}.alignment.mode={mode}", f"agents.{role}.loss.type={loss}")
    (minibatch,), (plan,) = batch.minibatches, batch.plans
    policy = tiny_policy("llama")
    exact = copy.deepcopy(policy.model).double()
    total, denominator, seen = expected(config, role, batch, exact)
    assert minibatch.denominator == pytest.approx(denominator, rel=1e-12)
    rows = plan.rows
    assert plan.unique == len(seen) and len(rows.group) == len(seen) + 2 * (("0/0", 1, 0) in seen)
    assert ("0/0", 1, 0) in seen
    for at in range(len(rows.group)):
        query = plan.groups[rows.group[at]][0]
        weight, advantage = seen[query, int(rows.rollout[at]), int(rows.invocation[at])]
        count = 3 if (query, rows.rollout[at], rows.invocation[at]) == ("0/0", 1, 0) else 1
        assert rows.weight[at] == pytest.approx(weight / count, rel=1e-14)
        assert rows.advantage[at] == pytest.approx(advantage, rel=1e-6)
    (total / denominator).backward()
    wanted = [p.grad for p in exact.parameters() if p.grad is not None]
    found: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.clone() for p in policy.parameters() if p.grad is not None)
    )
    Learner(policy, optimizer, config.agents[role].loss, grad_clip=1e9).step(minibatch)
    assert len(found) == len(wanted) > 0
    scale = max(float(g.abs().max()) for g in wanted)
    assert scale > 1e-4
    worst = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    assert worst / scale < 1e-5  # the learner computes in float32


def test_statistics_and_counts_are_of_trajectories() -> None:
    """What a segmented conversation is worth to its group, what the metrics count and what the record says of it: one
    trajectory, as without segments."""
    (_, one), (_, several) = built("left", compact=False), built("left")
    assert one.mean == several.mean and one.std == several.std
    names = ("advantage/frac_zero", "align/dup_ratio", "align/drop_ratio")
    assert {n: one.metrics[n] for n in names} == {n: several.metrics[n] for n in names}
    assert one.plans[0].multiplicity.tolist() == several.plans[0].multiplicity.tolist()
    tables = [step_body(batch, {}, SETTINGS).table() for batch in (one, several)]
    assert len(tables[0]) == len(tables[1]) == len(several.members)
    for column in ("reward", "multiplicity", "advantage"):
        assert tables[0][column].tobytes() == tables[1][column].tobytes(), column
    np.testing.assert_allclose(tables[1]["weight"], tables[0]["weight"], rtol=1e-15)
    at = next(i for i, m in enumerate(several.members) if len(m.trajectory.segment_starts) == 3)
    assert tables[1]["length"][at] == 26


def test_credit_by_turns_stays_within_a_segment() -> None:
    """The observation of a segment's first turn is its own context: two rollouts that are asked the same there are
    compared, whatever each had said before its history was rewritten."""
    config = load_config(RELAY, ["agents.left.algorithm={type='turn_credit',gamma=1.0}"])
    rollouts = [GroupRollout(k, True, float(k), 0.0, {"left": 1}) for k in range(2)]
    # Different prompts, the same second context: [5, 6]. A token of the tail of each first segment is context too.
    members = [
        GroupMember(
            rollouts[k], 0, {}, float(k), 1.0, np.array([10 + k, 20, 30 + k, 5, 6, 40], np.int32),
            np.array([0, 1, 0, 0, 0, 1], np.uint8), starts,
        )
        for k, starts in ((0, (0, 3)), (1, (0, 3)))
    ]  # fmt: skip
    algorithm = open_algorithm(config, "left")
    ((low, high),) = algorithm.advantages([RolloutGroup("q", 2, rollouts, members)])
    np.testing.assert_allclose(np.asarray(high)[[1, 5]], [1, 2], atol=1e-5)  # alone, and compared
    np.testing.assert_allclose(np.asarray(low)[[1, 5]], [-1, -2], atol=1e-5)
    joined = [replace(m, segment_starts=(0,)) for m in members]
    ((_, alone),) = algorithm.advantages([RolloutGroup("q", 2, rollouts, joined)])
    np.testing.assert_allclose(np.asarray(alone)[[1, 5]], [1, 1], atol=1e-5)


def test_token_advantages_lie_on_their_segments() -> None:
    """One number a token of the whole trajectory: each row gets its own stretch."""
    _, batch = built("left", "agents.left.algorithm={type='turn_credit',gamma=0.5}")
    (plan,) = batch.plans
    found = {}
    for micro in batch.minibatches[0].micro:
        assert micro.token_advantages is not None
        for r, n in enumerate(micro.lengths.tolist()):
            row = (micro.ids[r, :n], micro.loss_mask[r, :n], micro.token_advantages[r, :n])
            found[tuple(row[0].tolist())] = [x.numpy() for x in row]
    held = next(m.trajectory for m in batch.members if len(m.trajectory.segment_starts) == 3)
    for place in held.segments():
        ids, mask, advantages = found[tuple(held.tokens[place].tolist())]
        assert (mask == (held.loss_mask[place] != 0)).all() and (ids == held.tokens[place]).all()
        assert not advantages[~mask].any() and advantages[mask].any()
    assert plan.rows.segment.max() == 2


# -- on the way and on disk --------------------------------------------------------------------------------------


def held() -> Trajectory:
    given = talk("sub", 1, 0, [9, 6, 11], 3)
    given.query, given.scores = "q", {"format": 1.0}
    return given


def test_a_log_keeps_the_segments(tmp_path: Path) -> None:
    """Over the wire, from disk and after a restart; a trajectory of one segment beside it."""
    log = TrajectoryLog(tmp_path / "log", role="sub", digest=DIGEST)
    server = Server("tcp://127.0.0.1:0", log.handlers(), barrier=log.sync)
    sent = [held(), talk("sub", 2, 0, [9], 4)]
    with log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        refs = [client.append(t).result(10) for t in sent]
        assert [log.read(r).segment_starts for r in refs] == [(0, 9, 15), (0,)]
    with TrajectoryLog(tmp_path / "log", role="sub", digest=DIGEST) as again:
        for given, ref in zip(sent, refs, strict=True):
            back = again.read(ref)
            assert same(given, back) and back.segment_starts == given.segment_starts


def test_a_log_of_before_reads_as_one_segment() -> None:
    """A record's meta without the last field is that of a trajectory in one piece."""
    given = held()
    old = codec.encode(["q", 1, "sub", 0, 0, 0, {"format": 1.0}, len(given)])
    meta = codec.decode(old, Meta)
    assert meta.segment_starts == (0,)
    payload = b"".join(getattr(given, n).tobytes() for n in ("tokens", "logprobs", "versions", "loss_mask"))
    assert trajectory(meta, payload).segments() == [slice(0, 26)]


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ((), "do not begin with 0"),
        ((3,), "do not begin with 0"),
        ((0, 9, 9), "segment start 9 behind 9 is outside 10..25 of 26"),
        ((0, 26), "segment start 26 behind 0 is outside"),
        ((0, 1 << 40), "is outside 1..25"),
        ((0, 25), "the segment at 25 begins with a sampled token"),
        ((0, 2), "the segment at 0 has no sampled token among 2"),
    ],
)
def test_wrong_starts_from_the_wire_are_refused(starts: tuple[int, ...], words: str) -> None:
    """By name, before anything is written."""
    given = held()
    given.loss_mask[2] = 0
    arrays = {n: getattr(given, n) for n in ("tokens", "logprobs", "versions", "loss_mask")}
    specs, frames = codec.pack_arrays(arrays)
    meta = Meta("q", 1, "sub", 0, 0, 0, {}, len(given), starts)
    with pytest.raises(BadMessage, match=words):
        checked_payload(Append(meta, specs), frames)
    good = msgspec.structs.replace(meta, segment_starts=(0, 9, 15))
    assert len(checked_payload(Append(good, specs), frames)) == 26 * 13


def test_a_record_keeps_the_segments_also_without_tokens(tmp_path: Path) -> None:
    """What was trained is rebuilt from it; a record of before has one segment."""
    for every in (1, 2):
        folder = tmp_path / str(every)
        recorder = RolloutRecorder(RecordConfig(tokens_every=every), folder / "rollouts" / "0", print)
        played = Rollout("q", 1, talk("main", 1, 0, [9], 4), {"sub": [held()]}, 1.0)
        recorder.train(1, 0, "q", 1, ("a", "b"), played, "")
        recorder.close()
        main, sub = Recording([folder]).rollouts["q/1"].body().trajectories
        assert (main.segment_starts, sub.segment_starts) == ((0,), (0, 9, 15))
        assert bool(sub.tokens) == (every == 1)
    fields = {n: getattr(main, n) for n in TrajectoryRecord.__struct_fields__ if n != "segment_starts"}
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=TrajectoryRecord)
    assert old.segment_starts == (0,)


def test_a_run_with_forks_replays_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sampled, shipped, stored, claimed, trained, recorded: main and a sub-agent with segments, bit for bit again; and
    the page shows where a segment begins."""
    out = tmp_path / "run"
    train(RELAY, out, "task.name=tests.forking_relay:ForkingRelay", "trainer.steps=2", "eval.every=2")
    replay_run(out, [], sample=12, seed=0)
    assert capsys.readouterr().out.splitlines()[-1] == "12 rollouts: every stage bit-equal"
    recording, view = Recording([out]), RunView(out)
    counts: dict[str, set[int]] = {}
    for rollout_id, rollout in recording.rollouts.items():
        for record, shown in zip(
            rollout.body().trajectories, view.rollout(rollout_id)["trajectories"], strict=True
        ):
            counts.setdefault(record.role, set()).add(len(record.segment_starts))
            borders = {turn["from"]: turn["segment"] for turn in shown["turns"] if turn["segment"]}
            assert borders == {start: n for n, start in enumerate(record.segment_starts[1:], 2)}
            assert sum(turn["tokens"] for turn in shown["turns"]) == record.n
    assert counts == {"main": {1, 3}, "left": {1, 2}, "right": {1}}


def test_a_border_between_stretches_of_one_kind_is_shown() -> None:
    """A segment that ends with context, before one that begins with it: two stretches, not one."""

    class Nothing:
        def tokenizers(self) -> dict[str, Path]:
            return {}

    given = held()
    given.loss_mask[7:9] = 0
    record = TrajectoryRecord("sub", 0, {}, 26, 0, 0, segment_starts=given.segment_starts)
    record.tokens, record.loss_mask = given.tokens.tobytes(), given.loss_mask.tobytes()
    record.logprobs = given.logprobs.tobytes()
    turns = Texts(Nothing()).turns(record)  # type: ignore[arg-type]
    assert [t["from"] for t in turns if t["segment"]] == [9, 15]
    before = next(t for t in turns if t["from"] + t["tokens"] == 9)
    assert not before["sampled"]


def test_slime_is_given_no_segments() -> None:
    """It would train the joined tokens as one sequence."""
    with pytest.raises(ValueError, match="'sub', invocation 0: 3 segments, expected 1"):
        slime.samples_of(Sample(), [held()], 0.5)


class Sample:
    """As much of slime's as samples_of looks at before it refuses."""

    index, rollout_id, metadata = 3, None, None
