"""prime-rl trains a team that shares one policy: its rl loss, and its credit, as M-GRPO.

prime-rl's trainer adds up rl_weight_t x term_t over the tokens of a step and divides by the number of tokens whose
weight is not 0. M-GRPO divides by the sum of its own weights, so a row's weight is

    mean of tokens      w_j         T / sum_j w_j |o_j|
    mean of sequences   w_j / |o_j| T / sum_j w_j                T: tokens that prime-rl counts

which makes the step's loss M-GRPO's exactly. T and the sums are of the whole step, known when the orchestrator cuts a
batch: `register` puts an algorithm, `MGRPO`, in the place of one of prime-rl's, and the factor where batches are cut.
Rows that prime-rl prunes because their advantage is 0 leave T and stay in the sums.

Deviations: the sampler is the old policy, prime-rl keeps no other log-probs. A trace of several branches is one
sequence in the weights, and one for each branch in a sequence's ratio. A sample that the trainer cuts at seq_len leaves
its tail out of T, as with prime-rl's own algorithms.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

import mgrpo
from mgrpo.errors import ConfigError

Mean = Literal["token", "sequence"]
_SEQUENCE_MEANS = ("grpo", "sapo", "gspo")
_TOKEN_MEANS = ("bnpo", "dapo", "cispo")


def loss(inputs: Any, **config: Any) -> Any:
    """prime-rl's LossOutputs of one sample, for `trainer.loss`: type = "custom", import_path =
    "mgrpo.integrations.prime_rl.loss", and in kwargs fields of GrpoLossConfig: the term of each token. What a row
    weighs, and what a step is divided by, is in the weights.

    inputs: prime-rl's LossInputs. Raises ConfigError for a setting that cannot be honoured, ValueError for
    advantages that differ within the sample, of a type whose ratio is the sequence's.
    """
    settings = _loss_config(tuple(sorted(config.items())))
    mask = inputs.loss_mask
    n = int(mask.sum())
    weight, advantages = inputs.loss_weights, inputs.advantages[mask]
    options = {"token_advantages": advantages}
    if settings.type == "gspo" or settings.ratio_level == "sequence":
        options = {"advantages": _one(advantages)}
    value, metrics = mgrpo.policy_loss(
        inputs.trainer_logprobs[mask],
        config=settings,
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32, device=mask.device),
        old_logprobs=inputs.inference_logprobs[mask],
        ref_logprobs=None if inputs.ref_logprobs is None else inputs.ref_logprobs[mask],
        token_weight=None if weight is None else weight[mask],
        denominator=1.0,
        **options,
    )
    if settings.type in _SEQUENCE_MEANS:
        value = value * n
    shown = {f"mgrpo/{name}": metric for name, metric in metrics.items() if name != "entropy"}
    outputs = importlib.import_module("prime_rl.trainer.rl.loss").LossOutputs
    return outputs(loss=value, metrics=shown)


@functools.lru_cache(maxsize=16)
def _loss_config(items: tuple[tuple[str, Any], ...]) -> mgrpo.GrpoLossConfig:
    """The settings in trainer.loss.kwargs; ConfigError naming one that cannot be honoured."""
    try:
        config = mgrpo.GrpoLossConfig(**dict(items))
    except ValidationError as error:
        raise ConfigError(f"trainer.loss.kwargs: {error.errors()[0]['msg']}") from error
    types = _SEQUENCE_MEANS + _TOKEN_MEANS
    refused = {
        "type": (config.type not in types, "one of " + ", ".join(types)),
        "entropy_coef": (config.entropy_coef != 0, "0: prime-rl's loss is given no entropy"),
        "correction": (config.correction != "none", "'none': the ratio is to the sampler's log-probs already"),
        "temperature": (config.temperature != 1, "1: prime-rl has divided by it"),
    }  # fmt: skip
    for name, (wrong, instead) in refused.items():
        if wrong:
            raise ConfigError(
                f"trainer.loss.kwargs.{name}: {getattr(config, name)!r} cannot be honoured; set instead {instead}"
            )
    return config


def _one(advantages: torch.Tensor) -> torch.Tensor:
    """(1,) the advantage that all tokens of a sample share."""
    if bool((advantages != advantages[0]).any()):
        raise ValueError(
            f"advantages: {float(advantages[0])} and others in one sample, whose ratio is the sequence's"
        )
    return advantages[:1]


def rl_weights(
    assigned: mgrpo.Assigned,
    tokens: Sequence[int] | npt.NDArray[np.int64],
    *,
    mean: Mean = "token",
    filtered: bool = True,
) -> npt.NDArray[np.float64]:
    """(n,) the rl weight of every token of each row of a step, for prime-rl's `rl_weights`; 0 leaves the row out.

    assigned: the step's rows by `mgrpo.assign`, without `fold`. tokens (n,): trained tokens of each row. mean: of
    tokens, or of sequences. filtered: prime-rl prunes rows whose advantage is 0 (train.filter_zero_advantages).
    """
    if mean not in ("token", "sequence"):
        raise ValueError(f"mean: {mean!r} is not one of token, sequence")
    count = np.asarray(tokens, np.float64)
    if count.shape != assigned.weight.shape or (count < 1).any():
        raise ValueError(
            f"tokens: shape {count.shape}, least {count.min(initial=np.inf):g}, expected {assigned.weight.shape} "
            "numbers of at least 1"
        )
    raw = assigned.weight if mean == "token" else assigned.weight / count
    counted = assigned.kept & (assigned.advantage != 0) if filtered else assigned.kept
    total = float((raw * count).sum())
    return raw * (float(count[counted].sum()) / total) if total else raw


def register(
    place: str = "grpo",
    *,
    d_max: int | Mapping[str, int],
    seed: int = 0,
    mode: str = "weights",
    estimator: str = "grpo",
    unbiased: bool = False,
    mean: Mean = "token",
) -> type:
    """Put M-GRPO in the place of one of prime-rl's algorithms, in the orchestrator's process before it starts; the
    class it makes, a subclass of prime-rl's Algorithm named MGRPO.

    place: the `type` that `orchestrator.train.algo` names. Roles are the agents' names; d_max: traces that each episode
    contributes, of every agent or of each. seed, mode, estimator, unbiased: as mgrpo.assign. mean: of tokens (dapo,
    cispo, bnpo) or of sequences (grpo, gspo, sapo), as the type in trainer.loss asks for.

    Raises ConfigError, here or when the orchestrator starts, naming the setting that cannot be honoured.
    """
    algo: Any = importlib.import_module("prime_rl.orchestrator.algo")
    sink = importlib.import_module("prime_rl.orchestrator.train_sink").TrainSink
    if place not in algo.ALGORITHM_CLASSES:
        known = ", ".join(algo.ALGORITHM_CLASSES)
        raise ConfigError(f"place: {place!r} is no algorithm of prime-rl, expected one of {known}")
    if algo.ALGORITHM_CLASSES[place].action_loss_type != "rl":
        raise ConfigError(
            f"place: {place!r} trains without advantages, expected one with the rl loss, such as 'grpo'"
        )
    if mean not in ("token", "sequence"):
        raise ConfigError(f"mean: {mean!r} is not one of token, sequence")
    settings: dict[str, Any] = {
        "d_max": d_max,
        "seed": seed,
        "mode": mode,
        "estimator": estimator,
        "unbiased": unbiased,
    }
    for role in d_max if isinstance(d_max, Mapping) else ("sub",):
        try:
            mgrpo.assign([0], role, [0], [0], [0.0], step=0, **settings)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    base: Any = algo.Algorithm
    traces_of = importlib.import_module("prime_rl.orchestrator.algo.base").iter_trainable_traces

    class MGRPO(base):  # type: ignore[misc]
        """M-GRPO's advantages and votes on the traces of a group."""

        is_mgrpo = True

        def __init__(self, config: Any, policy_pool: Any) -> None:
            if getattr(config, "length_penalty", None) is not None:
                raise ConfigError(
                    f"algo.length_penalty: {config.length_penalty!r} cannot be honoured; leave it out and shape the "
                    "rewards in the environment"
                )
            super().__init__(config, policy_pool)

        async def score_group(self, episodes: Sequence[Any]) -> None:
            _score(list(traces_of(episodes)), episodes, settings, mean, algo.assign_advantages)

    algo.ALGORITHM_CLASSES[place] = MGRPO
    if not hasattr(sink, "is_mgrpo"):
        sink.is_mgrpo = True
        sink.__init__ = _checked(sink.__init__)
        sink.process_batch = _normalised(sink.process_batch)
    return MGRPO


def _score(
    traces: Sequence[tuple[Any, Any]],
    episodes: Sequence[Any],
    settings: Mapping[str, Any],
    mean: Mean,
    assign_advantages: Callable[[Any, float], None],
) -> None:
    """Advantages and raw rl weights of one group on its traces' nodes: w, or w / |o| for a mean of sequences."""
    number = {id(episode): k for k, episode in enumerate(episodes)}
    rollout = [number[id(episode)] for episode, _ in traces]
    role = [str(trace.agent.name) for _, trace in traces]
    seen: dict[tuple[int, str], int] = {}
    invocation = []
    for key in zip(rollout, role, strict=True):
        invocation.append(seen.get(key, 0))
        seen[key] = invocation[-1] + 1
    first = episodes[0]
    assigned = mgrpo.assign(
        [f"{first.env.name}/{first.task.data.idx}"] * len(traces),
        role,
        rollout,
        invocation,
        [float(trace.reward) for _, trace in traces],
        step=first.run.work.step,
        **settings,
    )
    for (_, trace), advantage, w in zip(traces, assigned.advantage, assigned.weight, strict=True):
        nodes = [node for node in trace.nodes if any(node.mask)]
        tokens = sum(sum(node.mask) for node in nodes)
        assign_advantages(trace, float(advantage))
        for node in nodes:
            weight = float(w) if mean == "token" else float(w) / tokens
            node.loss_weights = {**(node.loss_weights or {}), "rl": [weight] * len(node.token_ids)}


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Any, config: Any, *args: Any, train_envs: Any, **kwargs: Any) -> None:
        """Refuse a batch whose rows could not be told apart."""
        if not config.train.filter_zero_advantages:
            raise ConfigError(
                "orchestrator.train.filter_zero_advantages: False cannot be honoured, a trace that the draw "
                "drops would be trained on; set instead True"
            )
        for env in train_envs:
            kind = type(env.algorithm)
            if kind.action_loss_type == "rl" and not getattr(kind, "is_mgrpo", False):
                raise ConfigError(
                    f"environment {env.name!r}: {kind.__name__} cannot share a batch with MGRPO, whose weights are of "
                    "the whole batch; set its algo.type to that of register()"
                )
        init(self, config, *args, train_envs=train_envs, **kwargs)

    return checked


def _normalised(process_batch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(process_batch)
    def normalised(self: Any) -> Any:
        """prime-rl's batch, its rl weights times the tokens it will count over the sum of the batch's weights."""
        before = {trace: sum(map(_weight, samples)) for trace, samples in self.pending_batch.items()}
        batch = process_batch(self)
        total = sum(weight for trace, weight in before.items() if trace not in self.pending_batch)
        counted = sum(
            1
            for sample in batch.samples
            for weight, trained in zip(sample.rl_weights or (), sample.mask, strict=False)
            if trained and weight
        )
        for sample in batch.samples:
            if sample.rl_weights is not None and total:
                sample.rl_weights = [weight * counted / total for weight in sample.rl_weights]
        return batch

    return normalised


def _weight(sample: Any) -> float:
    """The sum of a sample's rl weights over its trained tokens; a dropped trace has none."""
    return float(sum(w for w, trained in zip(sample.rl_weights or (), sample.mask, strict=False) if trained))
