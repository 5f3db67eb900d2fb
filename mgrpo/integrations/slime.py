"""slime trains an agent of a team: hooks at the import paths that its arguments take.

slime adds up, over the samples of an optimizer step, the sum over a sample's trained tokens divided by the sample's
entry in `rollout_mask_sums`, and divides by `global_batch_size`, the number of rollouts in the step. M-GRPO asks for

    loss = 1/D  sum_j w_j / |o_j|  sum_t term_t(A_j)          D = sum of w over the step

so |o_j| D / (w_j global_batch_size) in `rollout_mask_sums` makes slime's reducer compute it exactly, the KL and the
entropy with it. `convert_samples` writes that. Steps are cut by counting rollouts, so one without an invocation of the
role (d_k = 0) takes part as a sample of one masked token; D counts the others, which is the factor K / K'.

What a sample says of itself is in `Sample.metadata["mgrpo"]`: {"role": str, "invocation": int}, which `samples_of`
writes; without it the role is "main". A query is a `group_index`, a rollout a `rollout_id` (or `index`). A sample
without a trained token is no invocation. Settings are the mapping `mgrpo` in slime's --custom-config-path (`Settings`).

Deviations: slime's `clamp_min(denominator, 1)` would cut a vote above |o_j|; there the denominator is 1 and the rest
of the vote is in the advantage, where the KL and entropy terms do not see it.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import mgrpo
from mgrpo.errors import ConfigError
from mgrpo.integrations.slime_groups import claim
from mgrpo.integrations.slime_rows import Rows, Settings, flat, mask_of, reward_of, role_of, rollout_id_of

_CONVERT = "--custom-convert-samples-to-train-data-path mgrpo.integrations.slime.convert_samples"

# argument of slime -> (values that are honoured, why the others are not, what to set instead)
_UNSET = (None, False, 0, 0.0, "")
_REFUSED: dict[str, tuple[tuple[object, ...], str, str]] = {
    "calculate_per_token_loss": (_UNSET, "it divides by tokens and reads no rollout_mask_sums", "leave it out"),
    "custom_pg_loss_reducer_function_path": (_UNSET, "it reads no rollout_mask_sums", "leave it out"),
    "custom_advantage_function_path": (_UNSET, "it replaces the advantages", "leave it out"),
    "normalize_advantages": (_UNSET, "it takes the groups' advantages apart", "leave it out"),
    "use_rollout_routing_replay": (_UNSET, "a rollout without invocations has no experts to replay", "leave it out"),
    "log_passrate": (_UNSET, "prompts have not n_samples_per_prompt samples each", "leave it out"),
    "rewards_normalization": ((True,), "mgrpo normalises them", "leave out --disable-rewards-normalization"),
    "advantage_estimator": (("grpo", "gspo", "cispo"), "its advantages are not the samples' rewards", "grpo"),
    "loss_type": (("policy_loss",), "it has no advantages", "policy_loss"),
}  # fmt: skip
_REFUSED_FOLDED: dict[str, tuple[tuple[object, ...], str, str]] = {
    "use_opd": (_UNSET, "its advantages carry no vote", _CONVERT),
    "kl_loss_coef": (_UNSET, "slime's own converter counts every sample of the KL term once", _CONVERT),
    "entropy_coef": (_UNSET, "slime's own converter counts every sample of the entropy once", _CONVERT),
}


def check(args: Any) -> None:
    """Refuse what cannot be honoured before anything runs: the function for slime's --custom-megatron-init-path. The
    hooks check again. ConfigError names argument, value and what to set instead."""
    _check(args, folded=getattr(args, "custom_convert_samples_to_train_data_path", None) is None)


def _check(args: Any, folded: bool) -> None:
    """folded: slime's own converter runs, and the votes are in the advantages."""
    Settings.of(args).check()
    for name, (allowed, why, instead) in (_REFUSED | (_REFUSED_FOLDED if folded else {})).items():
        value = getattr(args, name, allowed[0])
        if name == "kl_loss_coef" and not getattr(args, "use_kl_loss", False):
            continue
        if not any(value is known or value == known for known in allowed):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: {value!r} cannot be honoured, {why}; set instead: {instead}")


def samples_of(
    sample: Any, trajectories: Sequence[mgrpo.Trajectory], reward: Mapping[str, float] | float
) -> list[Any]:
    """slime's samples of one rollout, for a custom generate function to return: a copy of `sample`, which slime gave
    it, for each trajectory of the roles that the job trains, or a masked one where there is none (d_k = 0).

    reward: of each trajectory, or of each role. Raises ValueError for a trajectory without a prompt or a sampled token,
    for one of several segments, and for roles without a reward.
    """
    base = copy.copy(sample)
    base.rollout_id = sample.index if sample.rollout_id is None else sample.rollout_id
    if not trajectories:
        return [_masked(base)]
    made = []
    for trajectory in trajectories:
        where = f"{trajectory.role!r}, invocation {trajectory.invocation}"
        if len(trajectory.segment_starts) > 1:
            raise ValueError(
                f"role {where}: {len(trajectory.segment_starts)} segments, expected 1: slime would train them as one "
                "sequence and give each row a vote of its own; keep its history append-only"
            )
        sampled = np.flatnonzero(trajectory.loss_mask)
        if not len(sampled) or not sampled[0]:
            raise ValueError(f"role {where}: {len(sampled)} sampled tokens and no prompt, expected both")
        if isinstance(reward, Mapping) and trajectory.role not in reward:
            raise ValueError(f"role {where}: no reward, only of {', '.join(map(repr, reward)) or 'none'}")
        first = int(sampled[0])
        row = copy.copy(base)
        row.tokens = trajectory.tokens.tolist()
        row.response_length = len(trajectory) - first
        row.loss_mask = trajectory.loss_mask[first:].astype(int).tolist()
        row.rollout_log_probs = trajectory.logprobs[first:].tolist()
        row.reward = float(reward[trajectory.role] if isinstance(reward, Mapping) else reward)
        own = {"role": trajectory.role, "invocation": trajectory.invocation}
        row.metadata = {**(sample.metadata or {}), "mgrpo": own}
        row.status = type(sample.status).COMPLETED
        made.append(row)
    return made


def _masked(sample: Any) -> Any:
    """The sample as that of a rollout with d_k = 0: a prompt and a response of one token each, the response masked."""
    token = sample.tokens[0] if sample.tokens else 0
    sample.tokens, sample.response, sample.response_length = [token, token], "", 1
    sample.loss_mask, sample.rollout_log_probs = [0], [0.0]
    sample.reward = 0.0
    sample.status = type(sample.status).COMPLETED
    return sample


def reward_post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """(raw rewards, advantages that carry the votes): for --custom-reward-post-process-path, with slime's own
    converter, which divides by all trained tokens of a rollout. Exact for the policy term alone: a KL or entropy term
    is refused, and `convert_samples` takes it."""
    _check(args, folded=True)
    rows = Rows(args, samples)
    total: dict[int, int] = {}
    for rollout, tokens in zip(rows.rollout_id, rows.tokens, strict=True):
        total[rollout] = total.get(rollout, 0) + int(tokens)
    share = np.array([total[rollout] for rollout in rows.rollout_id]) / np.maximum(rows.tokens, 1)
    return rows.reward, (rows.advantage * rows.vote * share).tolist()


def convert_samples(args: Any, samples: Sequence[Any]) -> dict[str, Any]:
    """What slime's trainer trains on: for --custom-convert-samples-to-train-data-path. Samples that the draw drops are
    left out; those of a rollout with d_k = 0 stay, masked, so that slime cuts its steps where it would."""
    _check(args, folded=False)
    rows = Rows(args, samples)
    kept = rows.kept()
    vote = np.where(rows.vote[kept] == 0, np.inf, rows.vote[kept])
    wanted = rows.tokens[kept] / vote  # (m,) |o_j| / vote, 0 where masked
    held = np.maximum(wanted, 1.0)  # as slime's reducer would
    advantage = rows.advantage[kept] * held / np.where(wanted == 0, 1.0, wanted)
    chosen = [samples[j] for j in kept]
    data: dict[str, Any] = {
        "tokens": [sample.tokens for sample in chosen],
        "response_lengths": [sample.response_length for sample in chosen],
        "rewards": advantage.tolist(),
        "raw_reward": [rows.reward[j] for j in kept],
        "truncated": [int(sample.status.value == "truncated") for sample in chosen],
        "sample_indices": [sample.index for sample in chosen],
        "rollout_ids": [rows.rollout_id[j] for j in kept],
        "loss_masks": [rows.mask[j] for j in kept],
        "rollout_mask_sums": held.tolist(),
    }
    return data | _optional(args, chosen)


def _optional(args: Any, samples: Sequence[Any]) -> dict[str, Any]:
    """The fields that slime's own converter sends where samples have them; masked samples need not."""
    data: dict[str, Any] = {}
    names = ["rollout_log_probs", "teacher_log_probs"]
    if getattr(args, "rollout_top_p", 1.0) != 1.0:
        names += ["rollout_top_p_token_ids", "rollout_top_p_token_offsets"]
    for name in names:
        values = [getattr(sample, name, None) for sample in samples]
        trained = [value is not None for value, s in zip(values, samples, strict=True) if any(mask_of(s))]
        if any(trained) != all(trained) or (name.startswith("rollout_top_p") and not any(trained)):
            raise ValueError(
                f"{name}: {sum(trained)} of {len(trained)} trained samples have it, expected all"
            )
        if any(trained):
            data[name] = [
                _masked_value(name, sample.response_length) if value is None else value
                for value, sample in zip(values, samples, strict=True)
            ]
    if any(getattr(sample, "multimodal_train_inputs", None) is not None for sample in samples):
        data["multimodal_train_inputs"] = [sample.multimodal_train_inputs for sample in samples]
    data["source_names"] = [(sample.metadata or {}).get("source_name") or "unknown" for sample in samples]
    return data


def _masked_value(name: str, length: int) -> list[float] | list[int]:
    """What a masked response of that length has under a name: log-probs 0, or an empty nucleus for each token."""
    if name.endswith("log_probs"):
        return [0.0] * length
    return [0] * (length + 1) if name.endswith("offsets") else []


def reward_nonzero(args: Any, samples: Sequence[Any], **_: Any) -> Any:
    """slime's DynamicFilterOutput of one group: for --dynamic-sampling-filter-path. A group is kept where the rewards
    of some role's invocations differ; a group without invocations is dropped."""
    rewards: dict[str, list[float]] = {}
    for sample in flat(samples):
        if any(mask_of(sample)):
            role = role_of(sample)
            rewards.setdefault(role, []).append(reward_of(args, sample))
    keep = any(max(values) - min(values) > 1e-6 for values in rewards.values())
    reason = None if keep else "zero_std" if rewards else "no_invocations"
    base = importlib.import_module("slime.rollout.filter_hub.base_types")
    return base.DynamicFilterOutput(keep=keep, reason=reason)


def rollout_log(
    rollout_id: int, args: Any, samples: Sequence[Any], rollout_extra_metrics: Any, rollout_time: float
) -> bool:
    """For --custom-rollout-log-function-path: adds, for each role, the invocations of a rollout (mean, and the share of
    rollouts without one) and the mean reward to slime's own metrics, which are then logged as ever (False)."""
    rows: dict[str, list[float]] = {}
    rollouts: dict[str, set[int]] = {}
    for sample in samples:
        if any(mask_of(sample)):
            role = role_of(sample)
            rows.setdefault(role, []).append(reward_of(args, sample))
            rollouts.setdefault(role, set()).add(rollout_id_of(sample))
    number = len({rollout_id_of(sample) for sample in samples})
    if rollout_extra_metrics is not None:
        for role, rewards in rows.items():
            rollout_extra_metrics[f"mgrpo/{role}/invocations"] = len(rewards) / number
            rollout_extra_metrics[f"mgrpo/{role}/rollouts_without"] = 1 - len(rollouts[role]) / number
            rollout_extra_metrics[f"mgrpo/{role}/reward"] = sum(rewards) / len(rewards)
    args.logged_rollout_id = rollout_id
    return False


def rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """slime's RolloutFnTrainOutput of `rollout_batch_size` whole groups of finished trajectories: for
    --rollout-function-path, where rollouts are played elsewhere. They come from `mgrpo.source`, or slime's data source
    has them. For evaluation, which plays, set --eval-function-path to slime's own.

    Raises ValueError for a sample without tokens or reward, DeadlineError where the source stays silent.
    """
    settings = Settings.of(args)
    base = importlib.import_module("slime.rollout.base_types")
    if settings.source is None or evaluation:
        groups = data_source.get_samples(getattr(args, "rollout_batch_size", 1))
        for sample in flat(groups):
            if not sample.tokens or sample.reward is None:
                raise ValueError(
                    f"sample {sample.index}: {len(sample.tokens)} tokens, reward {sample.reward}: not played; "
                    "set mgrpo.source, and --eval-function-path slime.rollout.sglang_rollout.generate_rollout"
                )
    if evaluation:
        played = flat(groups)
        truncated = [sample.status.value == "truncated" for sample in played]
        rewards = [reward_of(args, sample) for sample in played]
        return base.RolloutFnEvalOutput(
            data={"mgrpo": {"rewards": rewards, "truncated": truncated, "samples": played}}
        )
    metrics: dict[str, Any] = {}
    if settings.source is not None:
        groups, metrics = claim(args, settings, importlib.import_module("slime.utils.misc").load_function)
    return base.RolloutFnTrainOutput(samples=groups, metrics=metrics)
