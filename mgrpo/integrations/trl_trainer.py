"""M-GRPO inside TRL's own loop: TRL generates, scores, accumulates, steps and saves; the rows of sub-agents, their
votes and the loss are mgrpo's.

    rollout_func -> rows of the main agent + rows of sub-agents -> rewards (TRL's) -> groups, draw and votes
    (mgrpo.assign) -> micro-batches (TRL's) -> head and loss in model.forward (mgrpo.linear_grpo_loss)

Without rows of sub-agents the loss and its gradient are GRPOTrainer's own. What is divided by stays TRL's too: a loss
that TRL averages over the rows of a window is averaged over their votes, one that it divides by tokens is divided by
the tokens' votes, and ranks are averaged, as DDP does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

import mgrpo
from mgrpo.errors import ConfigError
from mgrpo.integrations import trl_settings as settings
from mgrpo.integrations.trl_head import add_grpo_head

EPS = 1e-4
"""What TRL adds to the deviation of a group's rewards."""

_ESTIMATORS = {"group": "grpo", "none": "dr_grpo", "batch": "batch"}  # scale_rewards -> mgrpo's name


@dataclass(frozen=True, slots=True)
class _SubRow:
    """One trajectory of a sub-agent, as rollout_func returned it."""

    main: int  # the row of the rollout that called it, among this rank's
    invocation: int
    role: str
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    logprobs: Sequence[float] | None
    env_mask: Sequence[int] | None
    reward: float | Callable[[float], float] | None


class MGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` that also trains on the trajectories of sub-agents, which share the model.

    d_max: for each role of a sub-agent, or one number for all, to how many trajectories a rollout is aligned.
    `rollout_func` then returns, beside prompt_ids, completion_ids and logprobs of the main agent's rows, "sub_rows":
    for each of them a list of dictionaries, one an invocation in the order of the calls: "prompt_ids" and
    "completion_ids" (lists of token ids), and where they apply "role" (default "sub"), "logprobs", "env_mask" (0 on
    tokens that the model did not sample) and "reward", a number or a function of the rollout's reward (default: the
    rollout's reward). Without d_max this is GRPOTrainer with mgrpo's loss.

    alignment: the `mode` of `mgrpo.assign`. Everything else: GRPOTrainer's arguments.
    Raises ConfigError, before a model is loaded, for settings that cannot be honoured.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *rest: Any,
        d_max: int | Mapping[str, int] | None = None,
        alignment: Literal["weights", "duplicate", "expected", "none"] = "weights",
        **kwargs: Any,
    ) -> None:
        if args is not None:
            settings.refuse(args, votes=d_max is not None)
            settings.loss_config(args)
        if d_max is not None and kwargs.get("rollout_func") is None and len(rest) < 10:
            raise ConfigError("d_max: given without rollout_func, which alone returns rows of sub-agents")
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        if self._is_vlm:
            raise ConfigError("processing_class: a processor of images cannot be honoured; give a tokenizer")
        if self.aux_loss_enabled:
            raise ConfigError(
                f"router_aux_loss_coef: {self.router_aux_loss_coef} cannot be honoured; set 0.0"
            )
        self.d_max, self.alignment = d_max, alignment
        self.grpo = settings.loss_config(self.args)
        self._sub_rows: list[_SubRow] = []
        self._rewards = torch.zeros(0)  # of all ranks' rollouts
        self._rounds = 0
        for policy in (self.model, self.ref_model):
            if policy is not None:
                add_grpo_head(
                    self.accelerator.unwrap_model(policy), head_in_float32=self.args.cast_lm_head_to_fp32
                )

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """TRL's, with the rows of sub-agents behind those of the main agent (in everything but the texts)."""
        prompt_ids, completion_ids, env, texts, logprobs, extra, *images = super()._generate(prompts)
        given = extra.pop("sub_rows", None)
        if self.d_max is None:
            if given is not None:
                raise ConfigError("sub_rows: returned by rollout_func, and MGRPOTrainer was given no d_max")
            return prompt_ids, completion_ids, env, texts, logprobs, extra, *images
        self._sub_rows = rows = _read(given, len(prompt_ids), logprobs is not None)
        if env is None and any(row.env_mask is not None for row in rows):
            env = [[1] * len(ids) for ids in completion_ids]
        if env is not None:
            env = [*env, *(row.env_mask or [1] * len(row.completion_ids) for row in rows)]
        if logprobs is not None:
            logprobs = [*logprobs, *(row.logprobs for row in rows)]
        prompt_ids = [*prompt_ids, *(row.prompt_ids for row in rows)]
        completion_ids = [*completion_ids, *(row.completion_ids for row in rows)]
        return prompt_ids, completion_ids, env, texts, logprobs, extra, *images

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids: list[Any]
    ) -> Tensor:
        """TRL's rewards, of the rollouts; the sum is kept for the sub-agents' rows."""
        found: Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids[: len(prompts)]
        )
        self._rewards = (found * self.reward_weights.to(found.device)).nansum(1)
        self._rewards[found.isnan().all(1)] = torch.nan
        return found

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return batch if self.d_max is None else self._vote(batch, len(inputs))

    def _vote(self, batch: dict[str, Any], n: int) -> dict[str, Any]:
        """The batch, whose first n rows are the main agent's, with advantages and votes of all rows; rows without a
        vote leave it, and rows of weight 0 make their number a multiple of the micro-batches'."""
        advantages, weights = self._assign(_mask(batch).sum(1), n)
        advantages = torch.cat([batch["advantages"], advantages.to(batch["advantages"])])
        weights = torch.cat([torch.ones(n), weights]).to(batch["advantages"])
        index = weights.nonzero().squeeze(1)
        live, parts = len(index), self.args.steps_per_generation if self.model.training else 1
        index = torch.cat([index, index.new_zeros(-live % parts)])
        total = len(weights)
        batch = batch | {"advantages": advantages, "seq_weight": weights}
        batch = {
            name: x[index] if isinstance(x, Tensor) and x.dim() and len(x) == total else x
            for name, x in batch.items()
        }
        for name in ("advantages", "seq_weight", "completion_mask"):
            batch[name][live:] = 0
        sums = torch.stack([batch["seq_weight"].sum(), (batch["seq_weight"] * _mask(batch).sum(1)).sum()])
        batch["weight_total"], batch["token_total"] = self.accelerator.reduce(sums, reduction="sum")
        return batch

    def _assign(self, tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(advantage, weight) of this rank's rows of sub-agents. The groups are those of all ranks."""
        rank, mode = self.accelerator.process_index, "train" if self.model.training else "eval"
        k = self.num_generations if mode == "train" else self.num_generations_eval
        rewards, trained = self._rewards.tolist(), tokens[n:].tolist()
        mine = []
        for at, row in enumerate(self._sub_rows):
            rollout = rank * n + row.main
            reward = rewards[rollout] if row.reward is None else row.reward
            reward = reward(rewards[rollout]) if callable(reward) else float(reward)
            # TRL trains on no rollout without a reward.
            if not math.isnan(rewards[rollout]) and trained[at]:
                mine.append((rank, at, rollout, row.role, row.invocation, reward))
        rows = gather_object(mine)
        advantage, weight = torch.zeros(2, len(self._sub_rows), dtype=torch.float64)
        self._rounds += 1
        if rows and self.d_max is not None:
            found = mgrpo.assign(
                query=[f"{self._rounds}/{rollout // k}" for _, _, rollout, *_ in rows],
                role=[row[3] for row in rows],
                rollout=[rollout % k for _, _, rollout, *_ in rows],
                invocation=_renumbered(rows),
                reward=[row[5] for row in rows],
                d_max=self.d_max,
                seed=self.args.seed,
                step=self.state.global_step,
                mode=self.alignment,
                estimator=_ESTIMATORS[self.args.scale_rewards],
                unbiased=self.args.scale_rewards != "none",
                eps=EPS,
                group_size=k,
            )
            for (owner, at, *_), a, w in zip(rows, found.advantage, found.weight, strict=True):
                if owner == rank:
                    advantage[at], weight[at] = float(a), float(w)
        self._metrics[mode]["sub_agents/rows"].append(float(len(rows)))
        self._metrics[mode]["sub_agents/reward"].append(
            sum(row[5] for row in rows) / len(rows) if rows else math.nan
        )
        return advantage, weight

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, None]:
        """Log-probs of the old and the reference policy by the head that the loss has: TRL's rounds logits under
        autocast, and a ratio of the two would not be 1 where the policy is the old one."""
        found, rows = [], batch_size or len(input_ids)
        for start in range(0, len(input_ids), rows):
            ids, attention = input_ids[start : start + rows], attention_mask[start : start + rows]
            call = {"loss_mask": attention[:, -logits_to_keep:], "temperature": self.temperature}
            with self.accelerator.autocast():
                found.append(model(input_ids=ids, attention_mask=attention, grpo=call)["logprobs"])
        return torch.cat(found), None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask, advantages = _mask(inputs), inputs["advantages"]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            advantages = _times(advantages, inputs["importance_sampling_ratio"])
        grpo = {
            "config": self.grpo,
            "loss_mask": mask.bool(),
            "advantages" if advantages.dim() == 1 else "token_advantages": advantages.float(),
            "seq_weight": inputs.get("seq_weight"),
            "old_logprobs": inputs.get("old_per_token_logps"),
            "ref_logprobs": inputs.get("ref_per_token_logps"),
            "denominator": self._denominator(inputs, mask),
        }
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            out = model(input_ids=ids, attention_mask=attention, grpo=grpo)
        self._note(out["metrics"], mask)
        loss: Tensor = out["loss"]
        return loss

    def _denominator(self, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """What the weighted sum of this micro-batch is divided by, so that the mean over ranks of the sum over an
        accumulation window is TRL's loss."""
        train = self.model.training
        window = float(self.current_gradient_accumulation_steps) if train else 1.0
        parts = self.args.steps_per_generation if train else 1  # windows' micro-batches in a generation batch
        share = float(window / (self.accelerator.num_processes * parts))
        weights, kind = inputs.get("seq_weight"), self.args.loss_type
        if kind == "bnpo":
            tokens: Tensor = mask.sum() if weights is None else (weights * mask.sum(1)).sum()
            return tokens.double().clamp(min=1.0) * window
        if kind in ("dapo", "cispo"):
            tokens = inputs["num_items_in_batch"] if weights is None else inputs["token_total"]
            return tokens.double().clamp(min=1.0) * share
        if weights is None:
            rows = torch.tensor(len(mask) * window, dtype=torch.float64, device=mask.device)
        else:
            rows = inputs["weight_total"].double() * share
        return rows * int(self.args.max_completion_length) if kind == "dr_grpo" else rows

    @torch.no_grad()
    def _note(self, metrics: dict[str, Tensor], mask: Tensor) -> None:
        """Log what TRL logs of a loss, as means over the tokens of all ranks; entropy and ratios are those of the rows
        that can move the policy."""
        low, high = metrics["clip_frac_low"], metrics["clip_frac_high"]
        found = {"entropy": metrics["entropy"]}
        if self.beta:
            found["kl"] = metrics["kl"]
        if self.args.loss_type == "cispo":
            found["cispo_clip_ratio"] = high
        elif self.args.loss_type != "sapo":
            found |= {
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low + high,
            }
        tokens = mask.sum().float()
        sums = torch.stack([tokens, *(x.float() * tokens for x in found.values())])
        total, *means = self.accelerator.reduce(sums, reduction="sum").tolist()
        log = self._metrics["train" if self.model.training else "eval"]
        for name, x in zip(found, means, strict=True):
            log[name].append(x / max(total, 1.0))


def _mask(batch: dict[str, Any]) -> Tensor:
    """(B, C), 1 where the model sampled the token."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def _times(advantages: Tensor, ratio: Tensor) -> Tensor:
    """Advantages (B,) or (B, C) times TRL's ratio of the engines (B, 1) or (B, C): every term is homogeneous in its
    advantage, and TRL's ratio is no part of the KL term."""
    if advantages.dim() == 1 and ratio.shape[1] == 1:
        return advantages * ratio[:, 0]
    return (advantages[:, None] if advantages.dim() == 1 else advantages) * ratio


def _renumbered(rows: Sequence[tuple[Any, ...]]) -> list[int]:
    """Invocation numbers 0.. of each rollout's rows of a role, in the order of the calls, where rows were left out."""
    seen: dict[tuple[int, str], list[int]] = {}
    for _, _, rollout, role, invocation, _ in rows:
        seen.setdefault((rollout, role), []).append(invocation)
    return [sorted(seen[rollout, role]).index(i) for _, _, rollout, role, i, _ in rows]


def _read(given: Any, rollouts: int, with_logprobs: bool) -> list[_SubRow]:
    """The rows of sub-agents that rollout_func returned, checked. ValueError naming the row and what is wrong."""
    if not isinstance(given, list) or len(given) != rollouts:
        what = f"{len(given)} entries" if isinstance(given, list) else type(given).__name__
        raise ValueError(
            f"sub_rows: rollout_func returned {what}, expected a list for each of {rollouts} rollouts"
        )
    found, calls = [], dict[tuple[int, str], int]()
    for main, rows in enumerate(given):
        for at, row in enumerate(rows):
            name, role = f"sub_rows[{main}][{at}]", str(row.get("role", "sub"))
            calls[main, role] = calls.get((main, role), -1) + 1
            length = len(row["completion_ids"])
            if not len(row["prompt_ids"]) or not length:
                raise ValueError(
                    f"{name}: prompt_ids or completion_ids are empty, expected at least one token"
                )
            for field in ("logprobs", "env_mask"):
                if row.get(field) is not None and len(row[field]) != length:
                    raise ValueError(f"{name}: {len(row[field])} {field} for {length} completion_ids")
            if with_logprobs and row.get("logprobs") is None:
                raise ValueError(f"{name}: logprobs are missing, and the rollouts have them")
            found.append(
                _SubRow(
                    main,
                    calls[main, role],
                    role,
                    row["prompt_ids"],
                    row["completion_ids"],
                    row.get("logprobs") if with_logprobs else None,
                    row.get("env_mask"),
                    row.get("reward"),
                )
            )
    return found
