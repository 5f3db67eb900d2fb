"""Whole optimizer steps of others on the team step of step_workload.py, and the ladder from TRL's trainer to ours.

    naive     transformers' model on padded rows with copies, log-softmax of all logits, autograd through it
    TRL       GRPOTrainer's own training_step: its split into micro-batches, its padding (prompts to the left,
              completions to the right, all micro-batches as wide as the generation batch), its chunked head, its loss
              and metrics. Only the rollouts are given. On a CPU its head scores every position of a row; on a GPU those
              that have a label ("compacted"), for which the one question that it asks of the device is answered with
              yes.
    ladder    mgrpo's MGRPOTrainer, which is TRL's trainer with our head and loss; with weights instead of copies; and
              with trajectories of advantage 0 left out

All train the same model object with the same optimizer, so weights and gradients are compared in place.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.step_verl import PYTHON, VerlRival
from bench.step_workload import LOSS, Team, join, make_tokenizer
from mgrpo.trainers.batch import MicroBatch, MiniBatch

VERL_COLUMNS = ("ids", "loss_mask", "rollout_logprobs", "lengths", "advantages")
Step = Callable[[], float | None]
"""One optimizer step. A rival in another process returns its own CPU seconds."""


@dataclass(slots=True)
class Trainee:
    """What all ways train, in place."""

    model: Any
    optimizer: torch.optim.Optimizer
    grad_clip: float = 1.0

    def step(self, backward: Callable[[], object]) -> None:
        """Gradient, clip, update: what is around every rival's loss."""
        self.optimizer.zero_grad(set_to_none=True)
        backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip, foreach=True)
        self.optimizer.step()

    def fill_state(self) -> None:
        """Adam's state, which the first step would make, without a change of the weights."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def naive_loss(model: Any, rows: MicroBatch, denominator: float, device: str) -> torch.Tensor:
    """The clipped loss of padded rows as a plain loop writes it: whole logits, log-softmax, autograd."""
    ids, lengths = rows.ids.to(device), rows.lengths.to(device)
    inside = torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]
    logits = model(input_ids=ids, attention_mask=inside.long(), use_cache=False).logits[:, :-1]
    logp = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    a = rows.advantages.to(device)[:, None]
    rate = (logp - rows.rollout_logprobs.to(device)[:, 1:]).exp()
    held = rate.clamp(1 - LOSS.clip_eps_low, 1 + LOSS.clip_eps_high)
    loss = -torch.minimum(rate * a, held * a) * rows.loss_mask[:, 1:].to(device)
    return (loss.sum(1) * rows.weights.to(device)).sum() / denominator


def generation(rows: MicroBatch, weighted: bool) -> dict[str, torch.Tensor]:
    """The rows as GRPOTrainer's generation batch. weighted: with the votes that MGRPOTrainer adds; else each row counts
    once, as copies do."""
    starts = rows.loss_mask.int().argmax(1)
    lengths = rows.lengths - starts
    prompts, completions = int(starts.max()), int(lengths.max())
    left = torch.arange(prompts)[None] - prompts + starts[:, None]  # columns of the row, negative on padding
    right = torch.arange(completions)[None] + starts[:, None]
    prompt_mask, mask = left >= 0, right < rows.lengths[:, None]
    left, right = left.clamp(min=0), right.clamp(max=rows.ids.shape[1] - 1)
    batch = {
        "prompt_ids": rows.ids.gather(1, left) * prompt_mask,
        "prompt_mask": prompt_mask.long(),
        "completion_ids": rows.ids.gather(1, right) * mask,
        "completion_mask": mask.long(),
        "tool_mask": rows.loss_mask.gather(1, right).long(),
        "advantages": rows.advantages.clone(),
        "old_per_token_logps": rows.rollout_logprobs.gather(1, right) * mask,
        "num_items_in_batch": rows.loss_mask.sum(),
    }
    if weighted:
        batch["seq_weight"] = rows.weights.clone()
        batch["weight_total"] = rows.weights.sum()
        batch["token_total"] = (rows.weights * rows.loss_mask.sum(1)).sum()
    return batch


def with_advantage(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows that can move the policy; what the loss is divided by stays."""
    kept = batch["advantages"] != 0
    return {name: x[kept] if x.dim() else x for name, x in batch.items()}


def filled(batch: dict[str, torch.Tensor], parts: int) -> dict[str, torch.Tensor]:
    """With rows of weight 0, as MGRPOTrainer adds them, so that `parts` micro-batches have the same number."""
    n = len(batch["advantages"])
    index = torch.cat([torch.arange(n), torch.zeros(-n % parts, dtype=torch.int64)])
    out = {name: x[index] if x.dim() else x for name, x in batch.items()}
    if len(index) > n:
        for name in ("advantages", "seq_weight", "completion_mask"):
            out[name][n:] = 0
    return out


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notices that TRL and transformers print for a trainer that is not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def trl_step(
    kind: Any, trainee: Trainee, batch: dict[str, torch.Tensor], rows: int, compact: bool = False
) -> Step:
    """An optimizer step of a GRPOTrainer (`kind`: TRL's or mgrpo's) on a batch that it need not generate. rows: of a
    micro-batch, at most."""
    from datasets import Dataset
    from trl import GRPOConfig

    class Prepared(kind):  # type: ignore[misc,valid-type]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            return batch

    model = trainee.model
    parts = -(-len(batch["advantages"]) // rows)
    if "seq_weight" in batch:
        batch = filled(batch, parts)
    while len(batch["advantages"]) % parts:  # TRL's micro-batches have the same number of rows
        parts += 1
    with quiet(), tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            per_device_train_batch_size=2, num_generations=2, loss_type="dapo", beta=0.0, temperature=1.0,
            epsilon=LOSS.clip_eps_low, epsilon_high=LOSS.clip_eps_high, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        before = model.forward
        trainer = Prepared(
            model,
            lambda completions, **_: [0.0] * len(completions),
            args,
            train_dataset=Dataset.from_dict({"prompt": ["w2"] * 2}),
            processing_class=make_tokenizer(model.config.vocab_size),
        )
        forward, model.forward = model.forward, before
    args.steps_per_generation = args.gradient_accumulation_steps = parts
    trainer.current_gradient_accumulation_steps = parts

    def backward() -> None:
        trainer._step = 0
        for _ in range(parts):
            trainer.training_step(model, {}, None)

    def step() -> None:
        asks = mock.patch("trl.trainer.utils._use_triton", lambda device: True)
        model.forward = forward
        try:
            with asks if compact else contextlib.nullcontext(), quiet():
                trainee.step(backward)
        finally:
            model.forward = before

    return step


def trl_steps(trainee: Trainee, team: Team, rows: int) -> dict[str, Step]:
    """TRL's trainer as it is and with its head compacted; nothing, with a line that says why, where TRL does not
    import."""
    try:
        from trl import GRPOTrainer
    except (ImportError, RuntimeError) as missing:  # what TRL itself lacks is a RuntimeError
        print(f"missing rival: TRL: {missing}")
        return {}
    copies = generation(join(list(team.copies.micro)), weighted=False)
    return {
        "TRL as it is": trl_step(GRPOTrainer, trainee, copies, rows),
        "TRL with a compacted head": trl_step(GRPOTrainer, trainee, copies, rows, compact=True),
    }


def ladder_steps(trainee: Trainee, team: Team, rows: int) -> dict[str, Step]:
    """What becomes of TRL's trainer rung by rung; nothing where TRL does not import."""
    try:
        from mgrpo.integrations.trl import MGRPOTrainer
    except (ImportError, RuntimeError):
        return {}
    copies = generation(join(list(team.copies.micro)), weighted=False)
    votes = generation(join(list(team.distinct.micro)), weighted=True)
    return {
        "TRL's trainer with our head": trl_step(MGRPOTrainer, trainee, copies, rows),
        "and weights instead of copies": trl_step(MGRPOTrainer, trainee, votes, rows),
        "and no trajectories of advantage 0": trl_step(MGRPOTrainer, trainee, with_advantage(votes), rows),
    }


def naive_step(
    trainee: Trainee, copies: MiniBatch, rows: int, device: str, context: Callable[[], Any]
) -> Step:
    """Micro-batches of `rows` rows in a shuffled order, each padded to its own width. context: what the forward is done
    in (autocast on a GPU)."""
    parts = shuffled(copies, rows)

    def backward() -> None:
        for part in parts:
            with context():
                loss = naive_loss(trainee.model, part, copies.denominator, device)
            loss.backward()

    return lambda: trainee.step(backward)


def shuffled(batch: MiniBatch, rows: int) -> list[MicroBatch]:
    """Micro-batches of `rows` rows in an order that knows nothing of lengths, as a data loader draws them."""
    whole = join(list(batch.micro))
    order = torch.randperm(len(whole.lengths), generator=torch.Generator().manual_seed(3))
    place = order.argsort()
    return [whole.rows((place >= at) & (place < at + rows)) for at in range(0, len(order), rows)]


def verl_rival(trainee: Trainee, copies: MiniBatch, rows: int, python: Path = PYTHON) -> VerlRival | None:
    """verl's process; None, with a line that says why, where its environment is not there."""
    whole = join(shuffled(copies, rows))
    columns = {name: getattr(whole, name) for name in VERL_COLUMNS}
    group = trainee.optimizer.param_groups[0]
    settings = {
        "clip_low": LOSS.clip_eps_low,
        "clip_high": LOSS.clip_eps_high,
        "rows": rows,
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
    }
    try:
        return VerlRival(trainee.model, columns, settings, python)
    except (OSError, RuntimeError) as missing:
        print(f"missing rival: verl: {missing}")
        return None
