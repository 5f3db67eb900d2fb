"""A plan as people read it, and as programs do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from mgrpo.planning.plan import AgentPlan, Limits, Suggestion


def render(plans: Sequence[tuple[AgentPlan, Sequence[Suggestion]]], limits: Limits) -> str:
    """The page: one section an agent, then what was assumed."""
    lines = ["predicted, before anything has run; GB are 10^9 bytes", ""]
    for plan, suggestions in plans:
        lines += _section(plan, suggestions)
    gpu, assumed = limits.gpu, limits.assumed
    lines.append(
        f"assumed: {gpu.name}, {gpu.flops / 1e12:g} bf16 TFLOP/s, {gpu.bandwidth / 1e12:g} TB/s; "
        + ", ".join(f"{name} {_number(value)}" for name, value in dataclasses.asdict(assumed).items())
    )
    return "\n".join(lines)


def _section(plan: AgentPlan, suggestions: Sequence[Suggestion]) -> Iterator[str]:
    n, m, host, t = plan.parameters, plan.memory, plan.host, plan.traffic
    yield f"agents.{plan.role}: {plan.model}"
    yield f"  settings      {plan.settings}"
    active = f", {_count(n.active)} active a token" if n.active != n.total else ""
    yield f"  parameters    {_count(n.total)}, {_count(n.trained)} train{active}; {n.layers} layers of {n.hidden}"
    yield "  a rank        GB"
    for label, value in (
        ("weights that train, float32", float(m.masters)),
        ("frozen weights", m.frozen),
        ("gradients", m.gradients),
        ("Adam", m.optimizer),
        ("copies and buffers", m.rest),
        ("activations and what is gathered", m.activations),
        ("head: logits of a chunk", m.head),
    ):
        yield f"    {label:34}{value / 1e9:8.2f}"
    yield f"    {'peak of a step, all at one time':34}{m.peak / 1e9:8.2f}"
    if plan.device == "cuda":
        beside = "with what is assumed beside the tensors"
    else:
        beside = "with what a process without tensors holds here, measured"
    yield f"    {'needed':34}{plan.needed / 1e9:8.2f}  of {plan.available / 1e9:.1f} {beside}"
    yield f"  a host        GB, {host.ranks} rank{'s' if host.ranks > 1 else ''} of this agent on it"
    for label, value in (
        ("processes", host.processes),
        ("tensors of ranks on the CPU", host.tensors),
        ("copies for checkpoints", host.checkpoint),
        ("publishing: base and patches", host.publishing),
    ):
        yield f"    {label:34}{value / 1e9:8.2f}"
    yield f"    {'needed':34}{host.total / 1e9:8.2f}  of {plan.host_available / 1e9:.1f}"
    yield f"  fits          {'yes' if plan.fits else 'NO'}"
    yield f"  weights       {_size(t.version)} a version; a patch {_patch(plan)}; a receiver spools a version on disk"
    yield f"  a step        {t.trajectories} trajectories, {_count(t.tokens)} tokens"
    yield (
        f"  on disk       trajectory log {_size(t.log)} a step (at most {_size(t.log_most)}), {_size(t.log_kept)} "
        f"until a checkpoint; store {_size(t.store)} a step"
    )
    if plan.split is not None:
        total = plan.split.total
        shares = [f"{name} {x:.0f} s ({x / total:.0%})" for name, x in dataclasses.asdict(plan.split).items()]
        yield f"  time a step   predicted: {', '.join(shares)}"
    if suggestions:
        yield "  what to change, each computed anew"
        for s in suggestions:
            verdict = "fits" if s.fits else "does not fit"
            needed = f"{s.needed / 1e9:.1f} GB, {verdict}" if s.needed != float("inf") else "-"
            yield f"    {' '.join(f'--set {c}' for c in s.change)}"
            yield f"        {needed}: {s.note}"
    yield ""


def _patch(plan: AgentPlan) -> str:
    least, most = plan.traffic.patch
    whole = plan.traffic.version
    if least == whole:
        return "is no shorter (float32 weights change everywhere)"
    return f"{_size(least)} to {_size(most)} ({least / whole:.1%} to {most / whole:.1%}, docs/weights.md)"


def as_dict(plans: Sequence[tuple[AgentPlan, Sequence[Suggestion]]], limits: Limits) -> dict[str, Any]:
    """Everything on the page, sizes in bytes, times in seconds."""
    agents = []
    for plan, suggestions in plans:
        found = dataclasses.asdict(plan) | {"fits": plan.fits}
        found["host"]["total"] = plan.host.total
        found["suggestions"] = [
            dataclasses.asdict(s) | {"needed": None if s.needed == float("inf") else s.needed}
            for s in suggestions
        ]
        agents.append(found)
    return {"predicted": True, "limits": dataclasses.asdict(limits), "agents": agents}


def _count(value: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _size(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} bytes"


def _number(value: float) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e8 else f"{value:g}"
