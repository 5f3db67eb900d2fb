"""Metrics of loss calls put together: micro-batches to an optimizer step, optimizer steps to an RL step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_RUN_NAMES = {  # what the loss reports -> what a run calls it
    "policy_loss": "loss/pg",
    "clip_frac_low": "loss/clip_ratio_low",
    "clip_frac_high": "loss/clip_ratio_high",
    "entropy": "policy/entropy",
    "kl": "policy/kl",
    "mismatch_kl": "policy/mismatch_kl",
    "grad_norm": "policy/grad_norm",
}


def read_metrics(
    parts: Sequence[tuple[int, Mapping[str, Tensor | float]]],
) -> list[tuple[int, dict[str, float]]]:
    """The parts as numbers of the host, which waits for the device once."""
    tensors = [v.double() for _, part in parts for v in part.values() if isinstance(v, Tensor)]
    read = iter(torch.stack(tensors).cpu().tolist() if tensors else ())
    return [
        (n, {name: next(read) if isinstance(v, Tensor) else v for name, v in part.items()})
        for n, part in parts
    ]


def join_metrics(parts: Sequence[tuple[int, Mapping[str, Tensor | float]]]) -> dict[str, float]:
    """Metrics of an optimizer step from those of its micro-batches (or ranks), each with its number of tokens, of which
    one at least is above 0; all have the denominator of the whole. Sums, extremes and means over the tokens, as the
    metric asks. The host waits for the device once."""
    out: dict[str, float] = {}
    numbers = read_metrics(parts)
    tokens = sum(n for n, _ in numbers)
    for name in numbers[0][1]:
        values = [(n, metrics[name]) for n, metrics in numbers]
        if name.endswith("_max"):
            out[name] = max(v for _, v in values)
        elif name.endswith("_min"):
            out[name] = min(v for _, v in values)
        elif name == "policy_loss" or name.endswith("_rows"):  # parts of one sum
            out[name] = sum(v for _, v in values)
        else:
            out[name] = sum(n * v for n, v in values) / tokens
    return out


def step_metrics(results: Sequence[Mapping[str, float]], lr: float) -> dict[str, float]:
    """Metrics of an RL step under a run's names (docs/metrics.md), from its optimizer steps in order: join_metrics of
    each and its "grad_norm". lr: learning rate. Log-probs are compared with the sampler's in the first, where nothing
    has been updated. No results: {}."""
    if not results:
        return {}
    out = {ours: sum(r[theirs] for r in results) / len(results) for theirs, ours in _RUN_NAMES.items()}
    out["policy/is_ratio_max"] = max(r["ratio_max"] for r in results)
    out["policy/is_ratio_min"] = min(r["ratio_min"] for r in results)
    out["policy/lr"] = lr
    out["policy/logprob_diff_max"] = results[0]["logprob_diff_max"]
    return out
