"""A run whose trainer computes shared prefixes once: what its steps share, its record, and its replay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from mgrpo.cli.replay import replay_run
from mgrpo.config import load_config, view_of
from mgrpo.model import sharing
from mgrpo.model.policy import save_policy
from mgrpo.pipeline.batch import BatchBuilder, StepBatch
from mgrpo.pipeline.replay import DIFFERS, EQUAL, UNKNOWN
from mgrpo.pipeline.step_perf import entering_tokens
from mgrpo.pipeline.step_record import step_body
from mgrpo.pipeline.trainer_loop import TrainerLoop
from mgrpo.record.reader import Recording
from mgrpo.record.schema import MiniBatchRecord, StepBody, StepSettings
from mgrpo.trainers.torch.trainer import TorchTrainer
from mgrpo.trajectory_log.format import LogRef
from mgrpo.types import Trajectory
from tests.models import tiny_policy
from tests.prompted import WORDS
from tests.runs import ALONE, RELAY, resume, train
from tests.test_batch import groups
from tests.test_replay import replayer, rewrite

PROMPT = 40
TAIL = 5
SHARED = StepSettings(0.1, 1, 1, 1, True)


class Prompted:
    """A trajectory log whose trajectories begin with the prompt of their group and go on in their own way."""

    def read(self, ref: LogRef) -> Trajectory:
        prompt = np.arange(PROMPT) + 1000 * (ref.offset // 100)
        tokens = np.concatenate([prompt, np.full(TAIL, 5000 + ref.offset)]).astype(np.int32)
        mask = (np.arange(len(tokens)) >= PROMPT).astype(np.uint8)
        return Trajectory("", 0, "left", 0, tokens, mask, -mask.astype(np.float32), mask.astype(np.int32) - 1)


def build(capacity: int, shares: bool = True, ranks: int = 1) -> StepBatch:
    long = f"agents.left.max_length={PROMPT + TAIL}"
    config = load_config(
        RELAY, ["trainer.questions=2", "trainer.minibatches=1", f"trainer.micro_batch={capacity}", long]
    )
    return BatchBuilder(config, "left", Prompted(), ranks, shares).build(0, groups())


def computed(batch: StepBatch) -> int:
    """Distinct beginnings among the tokens that enter the model: of each micro-batch, or of those that follow one
    another with the same prefix together."""
    total, held, seen = 0, None, set[tuple[int, ...]]()
    for micro in batch.minibatches[0].micro:
        if micro.prefix is None or micro.prefix is not held:
            total, seen = total + len(seen), set()
        held = micro.prefix
        for ids, length in zip(micro.ids.tolist(), micro.lengths.tolist(), strict=True):
            seen |= {tuple(ids[: n + 1]) for n in range(max(length - 1, 1))}
    return total + len(seen)


def rows(batch: StepBatch) -> list[tuple[list[int], float, float]]:
    found = []
    for micro in batch.minibatches[0].micro:
        for r, length in enumerate(micro.lengths.tolist()):
            found.append(
                (micro.ids[r, :length].tolist(), float(micro.advantages[r]), float(micro.weights[r]))
            )
    return sorted(found)


@pytest.mark.parametrize(("capacity", "ranks", "holds"), [(64, 1, False), (48, 1, True), (64, 2, False)])
def test_a_step_is_packed_by_what_is_computed(capacity: int, ranks: int, holds: bool) -> None:
    """The same rows with the same numbers as in a step that shares nothing; each micro-batch computes no more than its
    capacity, and what the plan, the record and the metrics call computed is what a set of beginnings counts. Where a
    group is cut its prefix is one tensor, with which every row of its micro-batches begins."""
    batch, plain = build(capacity, ranks=ranks), build(capacity, shares=False, ranks=ranks)
    assert rows(batch) == rows(plain) and batch.metrics == plain.metrics
    micro = [m for m in batch.minibatches[0].micro if len(m.lengths)]
    entering = sum(map(entering_tokens, micro))
    shared = batch.plans[0].shared_tokens
    assert shared > 0 and entering - shared == computed(batch)
    prefixes = {id(m.prefix): m.prefix for m in micro if m.prefix is not None}
    assert len(prefixes) == (2 if holds else 0)
    for part in micro:
        if part.prefix is not None:
            assert len(part.prefix) == PROMPT
            assert (part.ids[:, : len(part.prefix)] == part.prefix).all()
    body = step_body(batch, {}, StepSettings(0.1, 1, ranks, ranks, True))
    assert (body.minibatches[0].computed_tokens, body.minibatches[0].shared_tokens) == (
        entering - shared,
        shared,
    )
    of_rows = np.frombuffer(body.shared, "<i4")
    assert len(of_rows) == len(body.table()) and set(of_rows.tolist()) <= {0, PROMPT}
    if not holds:
        assert of_rows.sum() == shared


def test_records_of_before_are_read() -> None:
    """A step without the fields that say what was shared shared nothing; and the older reader ignores the new ones."""
    body = step_body(build(64), {"loss/pg": 1.0}, SHARED)
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(body))
    assert msgspec.convert(tree, StepBody) == body
    tree.pop("shared"), tree["settings"].pop("share_prefixes")
    for minibatch in tree["minibatches"]:
        minibatch.pop("computed_tokens"), minibatch.pop("shared_tokens")
    old = msgspec.convert(tree, StepBody)
    assert not old.settings.share_prefixes and old.shared == b""
    assert old.minibatches[0] == MiniBatchRecord(body.minibatches[0].denominator, body.minibatches[0].crc)
    assert step_body(build(64, shares=False), {}, StepSettings(0.1, 1, 1)).shared == b""


@pytest.mark.parametrize(("kind", "asked"), [("llama", True), ("llama", False), ("shift", True)])
def test_a_trainer_says_whether_it_shares(tmp_path: Path, kind: Any, asked: bool) -> None:
    """What the policy can decides how the feed packs; who asks for what its model cannot do is told why, once, and
    nobody else is."""
    save_policy(tiny_policy(kind), tmp_path / "start")
    config = load_config(ALONE, [f"agents.main.policy.share_prefixes={str(asked).lower()}"])
    events: list[str] = []
    feed: Any = SimpleNamespace(
        agent=config.agents["main"], say=events.append, share_prefixes=lambda: events.append("shares")
    )
    with TorchTrainer.open(view_of(config, "main"), tmp_path / "run") as trainer:
        trainer.load(tmp_path / "start")
        TrainerLoop(feed, None, None, trainer)._share_prefixes()  # type: ignore[arg-type]
        trainer.close()
    if kind == "shift":
        assert len(events) == 1 and events[0].startswith(
            "each row is computed whole (policy.share_prefixes): "
        )
    else:
        assert events == (["shares"] if asked else [])


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps that share, then two that do not."""
    run = tmp_path_factory.mktemp("runs") / "shared"
    sets = ["task.name=tests.prompted:PromptedTask", "agents.main.max_length=48", "eval.start_validation=0"]
    train(
        ALONE,
        run,
        *sets,
        "eval.heldout=1",
        "eval.validation=1",
        "trainer.steps=4",
        "trainer.checkpoint_every=2",
    )
    resume(run, "trainer.steps=6", "agents.main.policy.share_prefixes=false")
    return run


def test_a_run_shares_and_is_replayed(shared_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics say how much of a step was shared, the record what of each row; steps that shared and steps that did
    not are rebuilt bit by bit, in one go over both."""
    recording = Recording([shared_run])
    bodies = {step: found.body() for (_, step), found in recording.steps.items()}
    assert [bodies[s].settings.share_prefixes for s in range(6)] == [True] * 4 + [False] * 2
    for step, body in bodies.items():
        shared = np.frombuffer(body.shared, "<i4")
        assert (len(shared) and shared.max() >= WORDS) if step < 4 else not len(shared)
        assert body.minibatches[0].computed_tokens > 0
    reported: dict[int, dict[str, Any]] = {}
    for line in (shared_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "main/perf/shared" in record:
            reported[record["step"]] = record
    assert len(reported) == 6
    for number, step in enumerate(sorted(reported)):
        shared_tokens = sum(m.shared_tokens for m in bodies[number].minibatches)
        assert reported[step]["main/perf/shared_tokens"] == shared_tokens
        assert (0.2 < reported[step]["main/perf/shared"] < 1) == (number < 4)
    chosen = [f"{bodies[step].queries[0]}/0" for step in range(6)]
    replay_run(shared_run, chosen, sample=0, seed=0)
    assert capsys.readouterr().out.splitlines()[-1] == "6 rollouts: every stage bit-equal"


def test_a_replay_changes_its_way_between_two_steps(
    shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start on, without any checkpoint: weights and optimizer go on where the run no longer shared. Where this
    policy cannot do what the record says was done, the loss is not called different."""
    run = tmp_path / "run"
    shutil.copytree(shared_run, run)
    shutil.rmtree(run / "agents/main/record/checkpoints")
    queries = {step: found.body().queries[0] for (_, step), found in Recording([run]).steps.items()}
    replays = replayer(run)
    for step in (3, 5):
        assert {stage.status for stage in replays.replay(f"{queries[step]}/0")} == {EQUAL}
    monkeypatch.setattr(sharing, "choose", lambda *_: "it has conv layers")
    *others, loss = replayer(run).replay(f"{queries[1]}/0")
    assert loss.status == UNKNOWN and "it has conv layers" in loss.field
    assert {stage.status for stage in others} == {EQUAL}


def test_another_share_is_named(shared_run: Path, tmp_path: Path) -> None:
    """A row that shared one token less than the record says is found in the batch."""
    run = tmp_path / "run"
    shutil.copytree(shared_run, run)
    body = Recording([run]).steps["main", 1].body()
    row = int(np.argmax(np.frombuffer(body.shared, "<i4")))
    chosen = f"{body.queries[body.table()[row]['group']]}/{body.table()[row]['rollout']}"

    def change(head: Any, body: Any) -> None:
        if head.step == 1:
            shared = np.frombuffer(body.shared, "<i4").copy()
            shared[row] -= 1
            body.shared = shared.tobytes()

    rewrite(run, "agents/main/record", change)
    stages = {stage.name: stage for stage in replayer(run).replay(chosen)}
    assert (stages["batch"].status, stages["batch"].field) == (DIFFERS, "shared tokens of invocation 0")
    assert all(stages[name].status == EQUAL for name in ("reward", "advantage", "alignment", "loss"))
