"""Several ranks train one agent: what they compute is what one process computes, whoever wrote the checkpoint."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mgrpo.config import view_of
from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy, save_policy
from mgrpo.pipeline.batch import merge_streams
from mgrpo.pipeline.replay import Replayer
from mgrpo.record.reader import Recording
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.fsdp_ranks import (
    CUTS,
    MIDDLE,
    TOKENS,
    VARIANTS,
    config_of,
    cut,
    gradient,
    padded,
    prefixed,
    prefixed_batch,
    start_of,
    train,
)
from tests.models import tiny_policy
from tests.ranks import run_ranks
from tests.rows import rows_of
from tests.runs import (
    RELAY,
    command,
    final_weights,
    leftovers,
    records,
    started,
    steps_of,
    summary,
    wait_for,
)

Found = dict[str, Any]
BOUNDS = {"last": 2e-3, "half": 2e-3, "half tied": 2e-3}
"""Of weights and losses, where they are computed in bfloat16: another shape of a forward may round otherwise. The
forwards are of one shape here, and these weights agreed to 3e-7 when they were last looked at."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies to start from."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind in ("shift", "llama"):
        save_policy(tiny_policy(kind), folder / kind)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    """One process trains every variant and leaves a checkpoint of the middle."""
    found = {}
    for variant in VARIANTS:
        trainer = TorchTrainer(view_of(config_of(variant, 1), "main"), folder / "one" / variant, Ranks())
        found[variant] = train(trainer, start_of(folder, variant), save=True)
    return found


@pytest.fixture(scope="module")
def together(folder: Path, alone: Found) -> Found:
    """What two ranks found, see tests/fsdp_ranks.py."""
    run_ranks("tests.fsdp_ranks", str(folder))
    found: Found = torch.load(folder / "found.pt", weights_only=True)
    return found


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_take_the_steps_of_one(alone: Found, together: Found, variant: str) -> None:
    """Five steps of three minibatches, some micro-batches empty: losses and weights agree to 1e-5 (in bfloat16, where
    a forward of other shape rounds otherwise, to its precision)."""
    one, two = alone[variant], together[f"run/{variant}"]
    bound = BOUNDS.get(variant, 1e-5)
    assert furthest(one["before"], two["before"]) == 0.0
    assert furthest(one["after"], two["after"]) < bound
    assert furthest(one["after"], one["before"]) > 10 * bound
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert a.keys() == b.keys() and "loss/pg" in a
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=10 * bound, abs=bound), name
    for (flops, _), (of_both, memory) in zip(one["costs"], two["costs"], strict=True):
        assert of_both == flops > 0 and memory > 1e7  # the rows of all ranks, once


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_not_noticed(together: Found, variant: str) -> None:
    """Two ranks that go on from the checkpoint in the middle end with the bits of those that were never stopped."""
    run, resumed = together[f"run/{variant}"], together[f"resumed/{variant}"]
    assert (run["from"], resumed["from"]) == (0, MIDDLE)
    assert resumed["metrics"] == run["metrics"][MIDDLE:]
    assert furthest(run["after"], resumed["after"]) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_fits_any_number_of_ranks(
    folder: Path, alone: Found, together: Found, variant: str
) -> None:
    """One process resumes what two ranks wrote, and the other way round; the weights they begin with are the writer's
    to the last bit, and they end where the undisturbed run does."""
    bound = BOUNDS.get(variant, 1e-5)
    two = together[f"from one/{variant}"]
    one = train(
        TorchTrainer(view_of(config_of(variant, 1), "main"), folder / "two" / variant, Ranks()),
        start_of(folder, variant),
    )
    again = train(
        TorchTrainer(view_of(config_of(variant, 1), "main"), folder / "one" / variant, Ranks()),
        start_of(folder, variant),
    )
    assert one["from"] == two["from"] == again["from"] == MIDDLE
    assert furthest(one["before"], together[f"resumed/{variant}"]["before"]) == 0.0
    assert furthest(two["before"], again["before"]) == 0.0
    assert furthest(again["after"], alone[variant]["after"]) == 0.0
    assert furthest(one["after"], alone[variant]["after"]) < bound
    assert furthest(two["after"], alone[variant]["after"]) < bound


@pytest.mark.parametrize("kind", ["shift", "llama"])
def test_cuts_and_ranks_do_not_change_the_gradient(together: Found, kind: str) -> None:
    """1, 2 and 5 micro-batches over two ranks: the gradient of one process on the whole, a sum and no mean."""
    whole = gradient(tiny_policy(kind), cut(rows_of(1, near=True), CUTS[0], 1), Ranks(), lambda g: g)  # type: ignore[arg-type]
    scale = max(float(g.abs().max()) for g in whole)
    assert scale > 0
    for number in range(len(CUTS)):
        found = together[f"gradient/{kind}/{number}"]
        assert max(float((a - b).abs().max()) for a, b in zip(found, whole, strict=True)) < 1e-6 * scale


@pytest.mark.parametrize("kind", ["shift", "llama"])
def test_ranks_leave_spare_rows_of_the_head_alone(together: Found, kind: str) -> None:
    """A padded head, tied or not, gets the gradient of one process, which is 0 where there is no token."""
    policy, batch = padded(kind)
    whole = gradient(policy, batch, Ranks(), lambda g: g)
    found = together[f"gradient/{kind}/padded"]
    scale = max(float(g.abs().max()) for g in whole)
    assert max(float((a - b).abs().max()) for a, b in zip(found, whole, strict=True)) < 1e-6 * scale
    heads = [g for g in found if g.shape == policy.head_weight.shape]
    assert not heads[-1][TOKENS:].any() and heads[-1][:TOKENS].any()


@pytest.mark.parametrize("number", [0, 1])
def test_ranks_share_prefixes_as_one_process_does(together: Found, number: int) -> None:
    """Trees on both ranks, an empty micro-batch, a tree cut in two: the gradient of one process that computes every row
    whole."""
    policy, rows = prefixed()
    plain = Policy(policy.model, policy.tokenizer, "plain", PolicyConfig(share_prefixes=False))
    whole = gradient(plain, prefixed_batch(rows, number), Ranks(), lambda g: g)
    scale = max(float(g.abs().max()) for g in whole)
    found = together[f"gradient/prefixes/{number}"]
    assert scale > 0
    assert max(float((a - b).abs().max()) for a, b in zip(found, whole, strict=True)) < 1e-5 * scale


def test_another_number_of_ranks_is_refused() -> None:
    """Without torchrun, or with another number than the config's: an error that names both."""
    with pytest.raises(ConfigError, match=r"started 1 ranks, the config's policy\.ranks is 3"):
        Ranks(3)


def ranks_of(out: Path) -> dict[int, int]:
    """Rank -> pid of the processes of the run's trainer for "main"."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            env = dict(v.partition(b"=")[::2] for v in (entry / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if str(out).encode() in words and b"--agent" in words and b"RANK" in env:
            found[int(env[b"RANK"])] = int(entry.name)
    return found


def test_the_batcher_deals_a_step_out_to_the_ranks(recorded: Path) -> None:
    """Two ranks have the rows of one process between them, each once; joined roles included."""

    def rows(batch: MiniBatch) -> list[tuple[object, ...]]:
        return sorted(
            (m.ids[i, : m.lengths[i]].tolist(), float(m.advantages[i]), float(m.weights[i]))
            for m in batch.micro
            for i in range(len(m.lengths))
        )

    def step(ranks: int) -> list[MiniBatch]:
        config = recorded_run(recorded)
        config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"micro_batch": 64})})
        recording = Recording([recorded])
        replayer = Replayer(config, recording, RunFolder(recorded).agent)
        parts = []
        for role in ("main", "left"):
            body = recording.steps[role, 1].body()
            body.settings.ranks = body.settings.data_ranks = ranks
            batch, whole = replayer._build(role, 1, body)
            assert batch is not None and whole
            parts.append(batch)
        return merge_streams(parts)

    for one, two in zip(step(1), step(2), strict=True):
        shares = [two.shard(rank, 2) for rank in range(2)]
        assert one.denominator == two.denominator == shares[1].denominator
        assert len(shares[0].micro) == len(shares[1].micro) > 1
        assert rows(one) == rows(two) == sorted(rows(shares[0]) + rows(shares[1]))
        assert rows(shares[0]) and rows(shares[1])


def test_a_run_with_ranks_survives_the_loss_of_one(recorded: Path, tmp_path: Path) -> None:
    """A whole run with two ranks for "main", one of them killed: the run says which, ends near the run with one
    process, and leaves nothing behind."""
    two = tmp_path / "two"
    as_recorded = ("trainer.steps=12", "trainer.minibatches=2", "task.options.fail_every=4")
    profile = ("profile.steps=[8, 9]", "profile.ranks=[1]", 'profile.roles=["main"]')
    more = ("trainer.checkpoint_every=2", "agents.main.policy.ranks=2", *profile)
    sets = [f"--set={s}" for s in (*as_recorded, *more)]
    with started(command("train", str(RELAY), "--out", str(two), *sets)) as process:
        wait_for(lambda: steps_of(two) >= 3 or process.poll() is not None, "step 3", 150)
        os.kill(ranks_of(two)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    assert "trainer-main ended by error" in output and "rank 1 of 2: ended by signal SIGKILL" in output
    assert re.search(r"main: resumed at step [2468]", output), output
    assert leftovers(two) == [] and ranks_of(two) == {}
    assert summary(two)["finished"]
    assert sorted(path.name for path in (two / "profile").iterdir()) == [
        "main-rank1-steps-8-9.json.gz",
        "main-rank1-steps-8-9.txt",
    ]
    sequence = [r["seq"] for r in records(two)]
    assert sequence == sorted(set(sequence))  # nothing written twice
    for role, data in final_weights(recorded).items():
        a, b = (safetensors.torch.load(d) for d in (data, final_weights(two)[role]))
        assert furthest(a, b) < (1e-4 if role == "main" else 1e-3), role
