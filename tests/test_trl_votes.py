"""TRL's trainer with the rows of sub-agents: groups, votes, what the loss is divided by, ranks, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

import mgrpo  # noqa: E402
from mgrpo.errors import ConfigError  # noqa: E402
from mgrpo.integrations.trl import MGRPOTrainer  # noqa: E402
from tests import trl_cases as cases  # noqa: E402
from tests import trl_ranks as ranks  # noqa: E402

K = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return cases.save_model(tmp_path_factory.mktemp("model"))


def build(model: str, folder: Path, **more: Any) -> Any:
    extra = {name: more.pop(name) for name in ("rollout_func", "d_max") if name in more}
    args = cases.arguments(folder, num_generations=K, per_device_train_batch_size=4, **more)
    given = {"rollout_func": ranks.rollouts, "d_max": 2} | extra
    made = MGRPOTrainer(model, ranks.score, args, cases.prompts(6), **given)
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    made.model.train()
    return made


def inputs() -> list[dict[str, Any]]:
    """Two questions with K rollouts each."""
    return [{"prompt": f"w{3 + i} w{9 + i}"} for i in (0, 2) for _ in range(K)]


def expected_rows() -> list[tuple[int, int, float, list[int]]]:
    """(question, rollout, reward, completion) of each row of a sub-agent, in the order of the calls."""
    rollouts = ranks.rollouts([row["prompt"] for row in inputs()], None)
    outcome = ranks.score([row["prompt"] for row in inputs()], rollouts["completion_ids"])
    return [
        (main // K, main % K, row["reward"](outcome[main]), row["completion_ids"])
        for main, rows in enumerate(rollouts["sub_rows"])
        for row in rows
    ]


def test_sub_agents_rows_have_assigns_groups_and_votes(model: str, tmp_path: Path) -> None:
    """Advantage and weight of each kept row are those of mgrpo.assign on the same rewards, with TRL's deviation and
    epsilon; the main agent's rows have TRL's advantages and weight 1."""
    trainer = build(model, tmp_path)
    batch = trainer._generate_and_score_completions(inputs())
    rows = expected_rows()
    calls: dict[tuple[int, int], int] = {}
    invocations = []
    for question, rollout, *_ in rows:
        calls[question, rollout] = calls.get((question, rollout), -1) + 1
        invocations.append(calls[question, rollout])
    assigned = mgrpo.assign(
        [f"1/{q}" for q, *_ in rows], "sub", [r for _, r, *_ in rows], invocations, [x for _, _, x, _ in rows],
        d_max=2, seed=trainer.args.seed, step=0, unbiased=True, eps=1e-4, group_size=K,
    )  # fmt: skip
    assert 0 < assigned.kept.sum() < len(rows), "the case has to drop rows"
    kept = [i for i in range(len(rows)) if assigned.kept[i]]
    assert batch["seq_weight"].tolist() == pytest.approx(
        [1.0] * 4 + [float(assigned.weight[i]) for i in kept]
    )
    assert batch["advantages"][4:].tolist() == pytest.approx(
        [float(assigned.advantage[i]) for i in kept], abs=1e-6
    )
    for at, i in enumerate(kept):
        ids = batch["completion_ids"][4 + at][batch["completion_mask"][4 + at].bool()]
        assert ids.tolist() == rows[i][3]
    alone = build(model, tmp_path, rollout_func=ranks.rollouts_alone, d_max=None)
    theirs = alone._generate_and_score_completions(inputs())
    assert torch.equal(batch["advantages"][:4], theirs["advantages"])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo"])
def test_the_loss_is_the_weighted_mean(model: str, tmp_path: Path, loss_type: str) -> None:
    """The micro-batches of a window add up to the weighted sum over all rows, over what the type divides by; with
    several micro-batches there are rows of weight 0, which change nothing."""
    parts = 1 if loss_type == "bnpo" else 3
    clip = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    trainer = build(
        model, tmp_path, loss_type=loss_type, gradient_accumulation_steps=parts, **clip,
        num_generations_eval=K,
    )  # fmt: skip
    data = [*inputs(), *({"prompt": f"w{3 + i} w{9 + i}"} for i in (3, 4, 5, 1) for _ in range(K))]
    got = 0.0
    whole = trainer._generate_and_score_completions(data)
    logp = logprobs(trainer, whole)
    old = logp + 0.1 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    whole["old_per_token_logps"] = old
    assert len(whole["advantages"]) % parts == 0
    from trl.trainer.utils import split_tensor_dict

    for part in split_tensor_dict(whole, parts):
        got += float(trainer._compute_loss(trainer.model, part).detach())
    w, a = whole["seq_weight"].double(), whole["advantages"].double()
    n = whole["completion_mask"].sum(1).double()
    per_row = {"grpo": w, "dapo": w * n, "bnpo": w * n, "dr_grpo": w * n, "cispo": w * n}[loss_type]
    ratio = (logp.double() - old.double()).exp()
    if loss_type == "cispo":
        terms = -a[:, None] * ratio.clamp(max=5.0) * logp.double()
    else:
        terms = -torch.minimum(a[:, None] * ratio, a[:, None] * ratio.clamp(0.8, 1.2))
    terms = terms * whole["completion_mask"]
    rows = terms.sum(1) / n.clamp(min=1) if loss_type == "grpo" else terms.sum(1)
    divisor = w.sum() * cases.COMPLETION if loss_type == "dr_grpo" else per_row.sum()
    assert got == pytest.approx(float((w * rows).sum() / divisor), abs=2e-6)
    assert abs(got) > 1e-3


def logprobs(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, batch["completion_ids"][..., None])[..., 0]


def test_a_whole_training_moves_the_model_and_reports(model: str, tmp_path: Path) -> None:
    """Three steps through TRL's loop with two iterations over each generation."""
    trainer = ranks.train(model, tmp_path, 4, gradient_accumulation_steps=3, num_iterations=2)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 3
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in logs)
    assert logs[0]["sub_agents/rows"] > 0
    assert any(row["grad_norm"] > 1e-3 for row in logs)


@pytest.mark.slow
def test_two_ranks_do_what_one_does(model: str, tmp_path: Path) -> None:
    """Two gloo ranks under DDP with half the questions each end at the weights of one rank with all, also where a
    rank's rows have nothing to learn from: it takes part in every reduction."""
    alone = ranks.train(model, tmp_path, 4)
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.trl_ranks", model, str(tmp_path), "2"],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parent.parent,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = torch.load(tmp_path / "result.pt")
    for name, tensor in alone.model.state_dict().items():
        assert torch.allclose(tensor, found["weights"][name], rtol=0, atol=2e-6), name
    losses = [
        [row["loss"] for row in log if "loss" in row] for log in (alone.state.log_history, found["log"])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


BAD_ROWS = [
    (lambda rows: rows.pop(), "expected a list for each of 4 rollouts"),
    (lambda rows: rows[1].append({"prompt_ids": [], "completion_ids": [3]}), r"sub_rows\[1\].*empty"),
    (
        lambda rows: rows[1].append({"prompt_ids": [3], "completion_ids": [3, 4], "logprobs": [-1.0]}),
        r"sub_rows\[1\].*1 logprobs for 2 completion_ids",
    ),
    (
        lambda rows: rows[1].append({"prompt_ids": [3], "completion_ids": [3]}),
        r"sub_rows\[1\].*logprobs are missing",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_ROWS)
def test_wrong_rows_are_refused_by_name(model: str, tmp_path: Path, spoil: Any, message: str) -> None:
    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        found = ranks.rollouts(prompts, trainer)
        spoil(found["sub_rows"])
        return found

    trainer = build(model, tmp_path, rollout_func=rollouts)
    with pytest.raises(ValueError, match=message):
        trainer._generate_and_score_completions(inputs())


def test_sub_rows_without_d_max_are_refused(model: str, tmp_path: Path) -> None:
    trainer = build(model, tmp_path, d_max=None)
    with pytest.raises(ConfigError, match="sub_rows"):
        trainer._generate_and_score_completions(inputs())
