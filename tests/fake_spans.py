"""Spans of a run that nobody played: long rollouts among short ones, sub-agents, tools, trainers that wait."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from mgrpo.config.run import RecordConfig
from mgrpo.record.spans import Args, Span, SpanLog

SECOND = 1_000_000_000
ORIGIN = 1_700_000_000 * SECOND


def write_spans(run: Path, process: str, spans: Sequence[Span]) -> None:
    """As the process would have kept them, in the order in which they ended."""
    role = process.removeprefix("trainer ")
    folder = (
        run / "agents" / role / "record"
        if role != process
        else run / "rollouts" / process.removeprefix("rollout-")
    )
    log = SpanLog(RecordConfig(max_mb=500), folder, process, print)
    written = 0
    for span in sorted(spans, key=lambda s: s.end):
        log.add(span)
        if span.end - written > SECOND:  # a frame a second, as a process whose clock goes on writes them
            log.flush()
            written = span.end
    log.close()


def worker_spans(
    seed: int, ids: Sequence[str], places: int, seconds: float, turns: int = 4, name: str = "search"
) -> list[Span]:
    """Rollouts `ids` in `places` places within `seconds`; one of twelve takes four times as long as the others."""
    rng = random.Random(seed)
    free = [ORIGIN] * places
    usual = int(seconds * SECOND * places / max(1, len(ids)))
    spans: list[Span] = []
    for rollout in ids:
        place = min(range(places), key=free.__getitem__)
        start = free[place]
        length = int(usual * rng.uniform(0.4, 1.0) * (4 if rng.random() < 1 / 12 else 1))
        end = start + length
        failed = rng.random() < 0.05
        args: Args = {"split": "train", "status": "failed" if failed else "ok", "attempts": 1}
        spans.append(Span("rollout", rollout, rollout, start, end, args))
        spans += _inside(rng, rollout, start, end, turns, name)
        free[place] = end + usual // 20
    return spans


def _inside(rng: random.Random, lane: str, start: int, end: int, turns: int, name: str) -> list[Span]:
    each = (end - start) // max(1, turns)
    spans = [Span("invocation", "main", lane, start, end, {"role": "main", "invocation": 0, "attempt": 0})]
    for turn in range(turns):
        at = start + turn * each
        half = at + int(each * rng.uniform(0.3, 0.6))
        args: Args = {
            "role": "main",
            "invocation": 0,
            "attempt": 0,
            "turn": turn,
            "sampled": 40,
            "version": 3,
        }
        spans.append(Span("turn", "main", lane, at, half, args))
        if turn % 2:
            sub: Args = {"role": "left", "invocation": turn, "attempt": 0}
            spans.append(Span("invocation", "left", lane, half, at + each, sub))
            spans.append(Span("turn", "left", lane, half, at + each, sub | {"turn": 0, "sampled": 9}))
        else:
            spans.append(Span("tool", name, lane, half + each // 20, at + each - each // 20, {"attempt": 0}))
    return spans


def weight_spans(role: str, versions: int, seconds: float) -> list[Span]:
    """A worker's loads of the versions that trainer_spans() publishes."""
    each = int(seconds * SECOND / versions)
    return [
        Span(
            "update",
            role,
            f"weights {role}",
            at + each // 12,
            at + each // 8,
            {"version": v, "label": f"{role}.e1.v{v}"},
        )
        for v in range(1, versions + 1)
        for at in [ORIGIN + v * each]
    ]


def trainer_spans(role: str, steps: int, seconds: float) -> list[Span]:
    """Steps of equal length: half of each is waiting, the rest its other parts."""
    each = int(seconds * SECOND / steps)
    parts = (("wait", 0.5), ("train", 0.8), ("apply", 0.85), ("publish", 0.95), ("report", 1.0))
    spans = []
    for step in range(steps):
        begin = at = ORIGIN + step * each
        for kind, share in parts:
            end = begin + int(share * each)
            args: Args = {"step": step}
            if kind == "publish":
                args = {"version": step + 1, "label": f"{role}.e1.v{step + 1}"}
            spans.append(Span(kind, kind, "main", at, end, args))
            if kind == "train":
                half = (at + end) // 2
                spans += [
                    Span("stage", "forward", "main", at, half),
                    Span("stage", "backward", "main", half, end),
                ]
            at = end
        spans.append(Span("step", "step", "main", begin, begin + each, {"step": step}))
        claim: Args = {"step": step, "groups": 4}
        spans.append(Span("claim", "claim", "ahead", begin, begin + each // 5, claim))
        spans.append(Span("build", "build", "ahead", begin + each // 5, begin + each // 3, {"step": step}))
        spans.append(Span("record", "record", "record", begin + each // 2, begin + each // 2 + each // 9, {}))
    return spans


def add_run_of_spans(
    run: Path, roles: Sequence[str], ids: Sequence[str], seconds: float = 60.0, evil: str = "search"
) -> None:
    """Trainers of `roles` with 15 steps and one worker with 16 places, whose rollouts are `ids`; evil: name of their
    tool."""
    for role in roles:
        write_spans(run, f"trainer {role}", trainer_spans(role, 15, seconds))
    loads = [span for role in roles for span in weight_spans(role, 15, seconds)]
    write_spans(run, "rollout-0", worker_spans(7, ids, 16, seconds, name=evil) + loads)
