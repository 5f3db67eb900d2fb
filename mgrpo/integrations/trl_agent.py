"""TRL's trainer as the trainer of one agent of a run: its optimizer, its schedule, its checkpoints, callbacks and logs;
rollouts, advantages, votes and the loss are the run's.

    mgrpo.feed -> minibatches of a step -> Trainer's loop (forward, backward, clip, optimizer, schedule, log)
      -> applied -> publish weights -> (checkpoint-<n> -> saved)

One minibatch of the run is one optimizer step of the Trainer. A minibatch that cannot move the policy is left out, as
in the run's own trainers, so that optimizer and schedule count only steps that were taken.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import mgrpo
from mgrpo.errors import ConfigError, NumericsError
from mgrpo.integrations import trl_settings as settings
from mgrpo.integrations.trl_head import add_grpo_head

STEPS = "mgrpo_steps.json"
"""In each checkpoint: the numbers of RL steps that it is the state after."""

_POLICY = (
    *("dtype", "head_dtype", "aux_loss_coef", "routing_replay", "train_router", "last_layers", "lora"),
    "ranks",
)
"""Settings of agents.<role>.policy that are our own trainer's; here the model is as TRL loads it."""


class AgentTrainer:
    """The agent `role` of a run, trained by TRL: `AgentTrainer("run.toml", role="sub", out="runs/a").train()`, while
    `mgrpo train run.toml --out runs/a` runs everything else. In run.toml agents.<role>.policy.trainer is "external".

    args: a GRPOConfig, whose optimizer, schedule, precision, logging and output_dir hold. None: the optimizer and the
    learning rates of the run, and checkpoints in the agent's folder. callbacks, optimizers: as TRL's. overrides: as
    `mgrpo train --set`. Raises ConfigError for settings that cannot be honoured.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        role: str,
        out: str | Path,
        args: Any = None,
        overrides: Sequence[str] = (),
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if args is not None:
            settings.refuse_for_agent(args, role)
            if args.save_total_limit == 1:
                raise ConfigError(
                    "save_total_limit: 1 cannot be honoured: the checkpoint before the newest must stay until the run "
                    "knows of the newest; set 2"
                )
            if args.world_size > 1:
                raise ConfigError(
                    f"args: {args.world_size} processes, and AgentTrainer has one; start it without torchrun"
                )
        self.run, self.role, self.out, self.args = run, role, out, args
        self.overrides, self.callbacks, self.optimizers = tuple(overrides), callbacks, optimizers
        self.trainer: Any = None
        """TRL's trainer, once train() has begun."""

    def train(self) -> Any:
        """Train from the run's next step to its last, and serve the final weights until the run is over; TRL's
        TrainOutput. Started again after an interruption it goes on from the last checkpoint."""
        with mgrpo.feed(str(self.run), self.role, str(self.out), overrides=self.overrides) as feed:
            self.trainer = _FeedTrainer(feed, self.args, self.callbacks, self.optimizers)
            return self.trainer.train_agent()


class _FeedTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer on the minibatches of a feed."""

    def __init__(self, feed: Any, args: Any, callbacks: Any, optimizers: tuple[Any, Any]) -> None:
        _check(feed)
        self.feed, self.loss, self._of_run = feed, feed.agent.loss, args is None
        how = (
            {}
            if args is None
            else {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        )
        how = {"dtype": torch.float32} | how
        model = AutoModelForCausalLM.from_pretrained(feed.start, **how)
        tokenizer = AutoTokenizer.from_pretrained(feed.start)
        if self._of_run and optimizers == (None, None):
            o = feed.agent.optimizer
            optimizers = (
                torch.optim.AdamW(model.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay),
                None,
            )
        super().__init__(
            model,
            _no_reward,
            _arguments(feed, args, model),
            Dataset.from_dict({"prompt": [""]}),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        head = {
            "vocabulary": sorted(set(tokenizer.get_vocab().values())),
            "head_in_float32": self.args.cast_lm_head_to_fp32,
        }
        add_grpo_head(self.model, **head)
        self.reference = None
        if self.loss.kl_coef:
            self.reference = add_grpo_head(AutoModelForCausalLM.from_pretrained(feed.start, **how), **head)
            self.reference.to(self.args.device).eval().requires_grad_(False)
        self._results: list[dict[str, float]] = []  # of the optimizer steps of this RL step
        self._parts: list[
            tuple[int, Mapping[str, Tensor]]
        ] = []  # of the micro-batches of this optimizer step
        self._lr = 0.0  # of the last optimizer step
        self._saved_at: int | None = None  # optimizer steps of the newest checkpoint
        self._left: int | None = (
            None  # optimizer steps of this RL step that are still to come; None: it is done
        )

    # -- the loop --------------------------------------------------------------------------------------------------

    def train_agent(self) -> Any:
        """train(), from the checkpoint that the run goes on from."""
        checkpoint = self._checkpoint_of(self.feed.step) if self.feed.step else None
        if checkpoint is not None:
            self._saved_at = int(checkpoint.rpartition("-")[2])
        result = self.train(resume_from_checkpoint=checkpoint)
        if self._left == 0:  # the Trainer asks for no batch after its last step
            self._end_step()
        if self.feed.step > self.feed.saved_step:
            self._save_step()
        return result

    def get_train_dataloader(self) -> Any:
        """The feed's minibatches. No DataLoader, which would ask for the next one before this one is trained on."""
        return _Minibatches(self)

    def minibatches(self) -> Iterator[dict[str, Any]]:
        """Those that can move the policy, one an optimizer step; between the steps what the run must know."""
        if self.feed.step:
            self.feed.publish(self.accelerator.unwrap_model(self.model))
        for step in self.feed:
            live = [batch for batch in step.minibatches if any(len(m.lengths) for m in self._rows(batch))]
            if step.recompute_old:
                for micro in (m for batch in step.minibatches for m in batch.micro if len(m.lengths)):
                    micro.old_logprobs = self._logprobs(self.model, micro)
            self._results, self._left = [], len(live)
            for batch in live:
                for group in self.optimizer.param_groups if self._of_run else ():
                    group["lr"] = step.lr
                self._left -= 1
                yield {"minibatch": batch}
            self._end_step()
        self.control.should_training_stop = True

    def _end_step(self) -> None:
        """All optimizer steps of the RL step are taken."""
        self._left = None
        self.feed.applied(mgrpo.step_metrics(self._results, self._lr))
        self.feed.publish(self.accelerator.unwrap_model(self.model))
        trainer = self.feed.config.trainer
        if self.feed.step % trainer.checkpoint_every == 0 or self.feed.step == trainer.steps:
            self._save_step()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of each micro-batch of the minibatch; what is divided by is the whole minibatch's."""
        model.train()
        batch, self._parts = inputs["minibatch"], []
        total = torch.zeros((), device=self.args.device)
        for micro in self._rows(batch):
            if not len(micro.lengths):
                continue
            with self.compute_loss_context_manager():
                out = model(
                    input_ids=micro.ids.to(self.args.device), grpo=self._inputs(micro, batch.denominator)
                )
            self.accelerator.backward(out["loss"])
            self._parts.append((int(micro.loss_mask[:, 1:].sum()), out["metrics"]))
            total += out["loss"].detach()
        return total

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer's, of each optimizer step, before it is taken."""
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        result = mgrpo.join_metrics(self._parts) | {"grad_norm": float(found)}
        if not math.isfinite(result["grad_norm"]) or result["nonfinite_rows"]:
            raise NumericsError(
                f"gradient norm {result['grad_norm']}, {result['nonfinite_rows']:.0f} tokens with non-finite "
                "log-probs; the step was not taken"
            )
        self._results.append(result)
        self._lr = self._get_learning_rate()  # the scheduler's next one comes before the RL step ends
        return found

    def _get_learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: a minibatch has no one shape."""
        return 0

    # -- the loss --------------------------------------------------------------------------------------------------

    def _rows(self, batch: Any) -> list[Any]:
        """The rows of each micro-batch that are computed: all where the loss acts without an advantage too."""
        every = self.loss.kl_coef or self.loss.entropy_coef or not self.loss.is_built_in
        return [micro if every else micro.rows(micro.with_advantage()) for micro in batch.micro]

    def _inputs(self, micro: Any, denominator: float) -> dict[str, Any]:
        """What the head takes for a micro-batch; the first token of a row is never sampled."""
        old = micro.rollout_logprobs if micro.old_logprobs is None else micro.old_logprobs
        tokens = {
            "loss_mask": micro.loss_mask,
            "old_logprobs": old,
            "rollout_logprobs": micro.rollout_logprobs,
            "ref_logprobs": None if self.reference is None else self._logprobs(self.reference, micro),
            "token_advantages": micro.token_advantages,
        }
        rows = {
            "advantages": micro.advantages if micro.token_advantages is None else None,
            "seq_weight": micro.weights,
        }
        given = {name: x if x is None else x[:, 1:] for name, x in tokens.items()} | rows
        given = {name: x if x is None else x.to(self.args.device) for name, x in given.items()}
        return given | {"config": self.loss, "denominator": denominator}

    @torch.no_grad()
    def _logprobs(self, model: Any, micro: Any) -> Tensor:
        """f32 (R, S): log-probs of the sampled tokens under `model`; 0 elsewhere."""
        call = {
            "loss_mask": micro.loss_mask[:, 1:].to(self.args.device),
            "temperature": self.loss.temperature,
        }
        with self.compute_loss_context_manager():
            found = model(input_ids=micro.ids.to(self.args.device), grpo=call)["logprobs"]
        return torch.nn.functional.pad(found, (1, 0)).to(micro.rollout_logprobs)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_step(self) -> None:
        """The Trainer's checkpoint of this state, on disk before the run hears of it."""
        step = self.feed.step
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        known = [step]
        if self._saved_at == self.state.global_step:  # no optimizer step since then: the same state
            known = [*_steps(folder), step]
        else:
            self._save_checkpoint(self.model, None)
            self._saved_at = self.state.global_step
        (folder / f"{STEPS}.new").write_text(json.dumps(known))
        (folder / f"{STEPS}.new").replace(folder / STEPS)
        for path in [*folder.rglob("*"), folder, folder.parent]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self.feed.saved(step)

    def _checkpoint_of(self, step: int) -> str:
        """Folder of the Trainer's newest checkpoint of so many RL steps."""
        folder = Path(self.args.output_dir)
        found = [path for path in folder.glob("checkpoint-*") if step in _steps(path)]
        if not found:
            raise ConfigError(
                f"{folder}: no checkpoint of step {step}, from which the run goes on; set args.output_dir to where it "
                "is, or begin the run again with --fresh"
            )
        return str(max(found, key=lambda path: (path / STEPS).stat().st_mtime))


class _Minibatches:
    """What the Trainer iterates over: of no known length."""

    def __init__(self, trainer: _FeedTrainer) -> None:
        self._found = trainer.minibatches()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._found


def _arguments(feed: Any, args: Any, model: Any) -> Any:
    """The GRPOConfig in force: the loop is the feed's, so lengths, saving and evaluation are not the Trainer's."""
    steps = feed.config.trainer.steps * feed.config.trainer.minibatches
    fixed = {
        "max_steps": steps,
        "save_strategy": "no",
        "eval_strategy": "no",
        "ignore_data_skip": True,
        "disable_dropout": True,
        "model_init_kwargs": None,  # the model is loaded already
    }
    if args is None:
        o = feed.agent.optimizer
        return GRPOConfig(
            output_dir=str(feed.folder / "trl"),
            use_cpu=feed.agent.policy.device == "cpu",
            bf16=False,
            learning_rate=o.lr,
            lr_scheduler_type="constant",
            max_grad_norm=o.grad_clip,
            gradient_checkpointing=feed.agent.policy.gradient_checkpointing,
            report_to="none",
            disable_tqdm=True,
            save_total_limit=2,
            seed=feed.config.seed,
            **fixed,
        )
    args = copy.copy(args)
    if not getattr(model, "supports_gradient_checkpointing", False):
        fixed |= {"gradient_checkpointing": False, "activation_checkpointing": False}
    for name, value in fixed.items():
        setattr(args, name, value)
    return args


def _check(feed: Any) -> None:
    """ConfigError for settings of agents.<role>.policy that only our own trainer honours."""
    policy = feed.agent.policy
    for name in _POLICY:
        value, default = getattr(policy, name), type(policy).model_fields[name].default
        if value != default:
            raise ConfigError(
                f"agents.{feed.role}.policy.{name}: {value} cannot be honoured by TRL's trainer; leave {default}"
            )


def _steps(folder: Path) -> list[int]:
    try:
        return [int(step) for step in json.loads((folder / STEPS).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """GRPOTrainer asks for a reward function; the run has the rewards."""
    return [0.0] * len(completions)
