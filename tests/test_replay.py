"""Replay: the record of a run says, to the last bit, what training did; whatever is changed in it is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from mgrpo.cli.replay import replay_run
from mgrpo.pipeline.batch import StepBatch, merge_streams
from mgrpo.pipeline.replay import DIFFERS, EQUAL, UNKNOWN, Replayer, Stage
from mgrpo.record.notes import Notes
from mgrpo.record.reader import Recording
from mgrpo.record.schema import RolloutBody, RolloutHead, StepBody, StepHead
from mgrpo.record.segments import SegmentWriter
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.trainers.batch import MiniBatch
from tests.runs import RELAY, final_weights, resume, train

STAGES = ["reward", "advantage", "alignment", "batch", "loss"]


def replayer(run: Path) -> Replayer:
    return Replayer(recorded_run(run), Recording([run]), RunFolder(run).agent)


def test_random_rollouts_are_bit_equal(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fifty random rollouts, three roles, five stages each: everything can be rebuilt from the record."""
    replay_run(recorded, [], sample=50, seed=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "50 rollouts: every stage bit-equal"
    assert len(lines) == 1 + 50 * 3
    assert all(line.count(" =") == len(STAGES) for line in lines[:-1])


def test_group_statistics_are_those_of_the_weighted_rewards(recorded: Path) -> None:
    """The recorded mean and deviation of each group are the weighted moments of its kept rewards, and the advantages
    follow from them."""
    checked = 0
    for step in Recording([recorded]).steps.values():
        body = step.body()
        table = body.table()
        for group, (mean, std) in enumerate(zip(body.mean, body.std, strict=True)):
            rows = table[(table["group"] == group) & (table["multiplicity"] > 0)]
            if not len(rows):
                assert (mean, std) == (0.0, 0.0)
                continue
            expected = np.average(rows["reward"], weights=rows["weight"])
            spread = np.sqrt(np.average((rows["reward"] - expected) ** 2, weights=rows["weight"]))
            assert np.isclose(mean, expected, rtol=1e-12) and np.isclose(std, spread, rtol=1e-12, atol=1e-12)
            wanted = (rows["reward"] - mean) / (std + 1e-6) if std else np.zeros(len(rows))
            np.testing.assert_allclose(rows["advantage"], wanted, rtol=1e-6)
            checked += std > 0
    assert checked > 10


def invoked(run: Path) -> str:
    """A rollout of a late step with at least one call of "left" and a group whose rewards differ."""
    recording = Recording([run])
    for rollout in recording.rollouts.values():
        head = rollout.head
        if head.split != "train" or head.step < 3 or head.d_k.get("left", 0) < 1 or not head.query:
            continue
        body = recording.steps["left", head.step].body()
        if body.std[body.queries.index(head.query)] > 0 and body.metrics.get("loss/pg") is not None:
            return head.id
    raise AssertionError("the run has no such rollout")


def rewrite(run: Path, part: str, change: Callable[[object, object], None]) -> None:
    """Write a part of the record again, whole and with valid checksums, after `change(head, body)`."""
    recording = Recording([run])
    every = [*recording.rollouts.values(), *recording.steps.values()]
    frames = [r for r in every if r.frame.path.parent == run / part]
    pairs = [(r.head, r.body()) for r in frames]
    for path in (run / part).glob("*.rec"):
        path.unlink()
    writer = SegmentWriter(run / part, 1 << 28)
    for head, body in pairs:
        change(head, body)
        writer.append(msgspec.msgpack.encode(head), msgspec.msgpack.encode(body))
    writer.close()


def of_rollout(name: str) -> Callable[[str], Callable[[object, object], None]]:
    """Changes of what the worker recorded of one rollout; of "left"'s first trajectory where it is about one."""

    def make(rollout_id: str) -> Callable[[object, object], None]:
        def change(head: object, body: object) -> None:
            assert isinstance(head, RolloutHead) and isinstance(body, RolloutBody)
            if head.id != rollout_id:
                return
            mine = next(t for t in body.trajectories if t.role == "left")
            if name == "correct":
                head.correct = 1.0 - head.correct
            elif name == "expert":
                mine.scores["expert"] = 1.0 - mine.scores["expert"]
            else:
                array = np.frombuffer(getattr(mine, name), np.uint8).copy()
                sampled = int(np.flatnonzero(np.frombuffer(mine.loss_mask, np.uint8))[-1])
                array[sampled * (1 if name == "loss_mask" else 4)] ^= 1
                setattr(mine, name, array.tobytes())

        return change

    return make


def of_step(name: str) -> Callable[[str], Callable[[object, object], None]]:
    """Changes of what the trainer of "left" recorded of the step with that rollout."""

    def make(rollout_id: str) -> Callable[[object, object], None]:
        query, _, rollout = rollout_id.rpartition("/")

        def change(head: object, body: object) -> None:
            assert isinstance(body, StepBody)
            if query not in body.queries:
                return
            group = body.queries.index(query)
            table = body.table().copy()
            mine = (table["group"] == group) & (table["rollout"] == int(rollout))
            if name in ("mean", "std"):
                getattr(body, name)[group] = float(np.nextafter(getattr(body, name)[group], 9))
            elif name == "denominator":
                body.minibatches[int(table[mine]["minibatch"][0])].denominator += 1
            elif name == "loss/pg":
                body.metrics[name] = float(np.nextafter(body.metrics[name], 9))
            else:
                column = table[name]
                more = np.nextafter(column, np.float32(9)) if column.dtype.kind == "f" else column + 1
                column[mine] = more[mine]
            body.rows = table.tobytes()

        return change

    return make


WORKER, TRAINER = "rollouts/0", "agents/left/record"


@pytest.mark.parametrize(
    ("part", "make", "stage", "field"),
    [
        (WORKER, of_rollout("correct"), "reward", "correct"),
        (WORKER, of_rollout("expert"), "reward", "score expert of invocation 0"),
        (WORKER, of_rollout("tokens"), "batch", "tokens of invocation 0"),
        (WORKER, of_rollout("logprobs"), "batch", "logprobs of invocation 0"),
        (WORKER, of_rollout("loss_mask"), "batch", "active of invocation 0"),
        (TRAINER, of_step("reward"), "reward", "reward of invocation 0"),
        (TRAINER, of_step("mean"), "advantage", "group mean"),
        (TRAINER, of_step("std"), "advantage", "group std"),
        (TRAINER, of_step("advantage"), "advantage", "advantage of invocation 0"),
        (TRAINER, of_step("multiplicity"), "alignment", "multiplicity of invocation 0"),
        (TRAINER, of_step("weight"), "alignment", "weight of invocation 0"),
        (TRAINER, of_step("denominator"), "batch", "denominator"),
        (TRAINER, of_step("loss/pg"), "loss", "loss/pg"),
    ],
)
def test_a_changed_field_is_named(
    recorded: Path,
    tmp_path: Path,
    part: str,
    make: Callable[[str], Callable[[object, object], None]],
    stage: str,
    field: str,
) -> None:
    """One field changed by one bit: the stages before it are equal, and the first that differs names it."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    chosen = invoked(run)
    rewrite(run, part, make(chosen))
    stages = [s for s in replayer(run).replay(chosen) if s.role == "left"]
    first = next(s for s in stages if s.status != EQUAL)
    assert (first.name, first.status, first.field) == (stage, DIFFERS, field)
    assert [s.name for s in stages] == STAGES


def test_what_was_not_kept_is_said(recorded: Path, tmp_path: Path) -> None:
    """Without tokens the batch and the loss are unknown, the credit is not; without the rollouts nothing is known."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    chosen = invoked(run)

    def forget(head: object, body: object) -> None:
        assert isinstance(body, RolloutBody)
        for t in body.trajectories:
            t.tokens = t.loss_mask = t.logprobs = t.versions = b""

    rewrite(run, WORKER, forget)
    stages: list[Stage] = [s for s in replayer(run).replay(chosen) if s.role == "left"]
    assert [s.status for s in stages] == [EQUAL] * 3 + ["not recorded"] * 2
    for path in (run / WORKER).glob("*.rec"):
        path.unlink()
    with pytest.raises(Exception, match="not in the record"):
        replayer(run).replay(chosen)


def test_a_resumed_run_is_replayed_with_what_each_step_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four steps of a falling learning rate; then resumed for six, with other checkpoints and bounds, and one trainer
    behind a damaged checkpoint: it takes the same groups again, with another learning rate. Every step of the history
    that survived can be rebuilt."""
    run, roles = tmp_path / "run", ("main", "left", "right")
    sets = [f"agents.{role}.optimizer.decay=1.0" for role in roles]
    sets += ["agents.right.shares=main", "agents.right.loss.type=grpo"]
    sets += ["trainer.checkpoint_every=2", "eval.start_validation=0", "eval.heldout=1", "eval.validation=1"]
    train(RELAY, run, "trainer.steps=4", *sets)
    before = {step: recorded.body() for step, recorded in Recording([run]).steps.items()}
    newest = run / "agents" / "left" / "checkpoints" / "step-00000004" / "__0_0.distcp"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    output = resume(
        run, "trainer.steps=6", "trainer.checkpoint_every=3", "trainer.keep_checkpoints=1", "record.checkpoints_mb=300",
        "eval.every=3",
    )  # fmt: skip
    assert "left: a checkpoint was passed over" in output and "step-00000004" in output
    assert "left: resumed at step 2, 8 groups again" in output
    recording = Recording([run])
    assert sorted(recording.steps) == sorted((role, step) for role in roles for step in range(6))
    after = {step: recorded.body() for step, recorded in recording.steps.items()}
    for role in roles:
        for step in range(4):
            assert after[role, step].queries == before[role, step].queries
    assert after["left", 2].settings.lr > before["left", 2].settings.lr == after["main", 2].settings.lr
    capsys.readouterr()
    chosen = [f"{after['main', step].queries[0]}/0" for step in range(6)]
    replay_run(run, chosen, sample=0, seed=0)
    assert capsys.readouterr().out.splitlines()[-1] == "6 rollouts: every stage bit-equal"


def test_a_step_is_replayed_with_its_threads_and_ranks(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Threads come from the step's record and are given back; a step of several ranks is not rebuilt by one."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    chosen = invoked(run)
    step = Recording([run]).rollouts[chosen].head.step

    def resumed(head: object, body: object) -> None:
        assert isinstance(body, StepBody)
        body.settings.threads = 3

    rewrite(run, TRAINER, resumed)
    threads: list[int] = []
    with monkeypatch.context() as patch:  # the step was in truth taken with the one thread that stays
        patch.setattr(torch, "set_num_threads", threads.append)
        assert all(s.status == EQUAL for s in replayer(run).replay(chosen))
    assert 3 in threads and threads[-1] == torch.get_num_threads() == 1

    def by_two(head: object, body: object) -> None:
        assert isinstance(head, StepHead) and isinstance(body, StepBody)
        body.settings.ranks = 2 if head.step == step else 1

    rewrite(run, TRAINER, by_two)
    loss = next(s for s in replayer(run).replay(chosen) if (s.role, s.name) == ("left", "loss"))
    assert loss.status == UNKNOWN and loss.field.startswith(f"2 ranks took step {step}")


def test_a_damaged_kept_checkpoint_is_passed_over(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torn, damaged or empty: losses are replayed from the one before it, or from the start."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    folder = run / "agents" / "left" / "record" / "checkpoints"
    (folder / "step-00000010" / "manifest.json").unlink()
    (folder / "step-00000011").mkdir()
    chosen = invoked(run)
    replay_run(run, [chosen], sample=0, seed=0)
    for path in folder.glob("step-*/.metadata"):
        path.write_bytes(b"x")
    replay_run(run, [chosen], sample=0, seed=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "  left" in line]
    assert len(lines) == 2 and all(line.count(" =") == len(STAGES) for line in lines)


def test_a_gap_of_the_record_is_not_called_equal(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step whose record is damaged, and one that is missing: said, with the status of what was not recorded."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    chosen = invoked(run)
    step = Recording([run]).rollouts[chosen].head.step
    found = Recording([run]).steps["left", step].frame
    data = bytearray(found.path.read_bytes())
    data[found.offset + found.length // 2] ^= 1
    found.path.write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        replay_run(run, [chosen], sample=0, seed=0)
    assert ended.value.code == 3 and "does not match its checksum" in capsys.readouterr().out
    for path in (run / TRAINER).glob("*.rec"):
        path.unlink()
    Notes(run / TRAINER).add("recording stopped at step 0: No space left on device")
    with pytest.raises(SystemExit) as ended:
        replay_run(run, [chosen], sample=0, seed=0)
    said = capsys.readouterr().out
    assert ended.value.code == 3 and f"reward not recorded (step {step} of left)" in said
    assert said.startswith("note: ") and "No space left on device" in said


def test_roles_that_share_a_policy_train_it_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One policy for "main" and "left": one trainer, one set of weights, both roles' groups in its steps, and a record
    from which every stage can be rebuilt."""
    run = tmp_path / "run"
    train(RELAY, run, "agents.left.shares=main", "trainer.steps=6", "trainer.minibatches=2")
    assert sorted(final_weights(run)) == ["main", "right"]
    config, recording = recorded_run(run), Recording([run])
    assert config.policy_roles == ("main", "right") and config.roles_of("main") == ("main", "left")
    for step in range(6):
        main, left = (recording.steps[role, step].body() for role in ("main", "left"))
        assert main.queries == left.queries
        learned = [{n: v for n, v in body.metrics.items() if n.startswith("loss/")} for body in (main, left)]
        assert learned[0] == learned[1]
    replay_run(run, [], sample=20, seed=0)
    assert capsys.readouterr().out.splitlines()[-1] == "20 rollouts: every stage bit-equal"


def test_denominators_of_shared_minibatches_add_up() -> None:
    """Joined, every micro-batch of every role is there once and is divided by the sum of the denominators."""

    def step(micro: list[str], denominators: tuple[float, float]) -> StepBatch:
        batches = [MiniBatch([m], d) for m, d in zip(micro, denominators, strict=True)]  # type: ignore[list-item]
        return StepBatch(0, [], [], [], [], [], batches, {})

    first, second = merge_streams([step(["a", "b"], (2.0, 3.0)), step(["c", "d"], (5.0, 7.0))])
    assert (first.micro, first.denominator) == (["a", "c"], 7.0)
    assert (second.micro, second.denominator) == (["b", "d"], 10.0)
