"""What every process did in the last steps, from metrics.jsonl: where time was spent, and where it was waited.

What the run page draws where no spans were recorded (span_timeline.py), and `mgrpo top`.

A trainer's step ends when its record is written, and its parts follow each other: waiting for the batch, training,
accounting for the groups, publishing the weights, the checkpoint, waiting for the record of the step before, the rest.
Rollout workers report how many of their places were taken on average while one version was the newest, which is one
bar of that height; with several workers it is their mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("wait_batch", "train", "apply", "weights", "checkpoint", "record")
"""Of time/*; what is left of a step is "other"."""
STEPS = 12
ROLLOUTS = "rollouts"
SIGNS = {
    "wait_batch": ("·", "waits"), "train": ("█", "trains"), "apply": ("a", "store"), "weights": ("▒", "weights"),
    "checkpoint": ("c", "checkpoint"), "record": ("r", "record"), "other": ("░", "other"),
}  # fmt: skip
"""Part -> its sign and its word in a terminal."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Seconds since the run began. part: one of PARTS or "other"; of rollouts "busy". share: of the places that were
    taken; 1 for a trainer's."""

    step: int
    part: str
    start: float
    end: float
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """The bars of each trainer, by role, and those of all rollout workers, within [start, end]."""

    start: float
    end: float
    rows: dict[str, list[Bar]]

    def as_json(self) -> dict[str, Any]:
        rows = {
            name: [[b.step, b.part, b.start, b.end, b.share] for b in bars]
            for name, bars in self.rows.items()
        }
        return {"kind": "metrics", "start": self.start, "end": self.end, "rows": rows}


def timeline(
    records: Iterable[Mapping[str, Any]], roles: Iterable[str], last: int = STEPS
) -> Timeline | None:
    """Of the last steps of each role. records: as read_metrics() gives them; None while no step is among them."""
    kept = list(records)
    rows = {role: _trainer(kept, role, last) for role in roles}
    rows = {role: bars for role, bars in rows.items() if bars}
    if not rows:
        return None
    start = min(bars[0].start for bars in rows.values())
    end = max(bars[-1].end for bars in rows.values())
    if rollouts := [_cut(bar, start) for bar in _rollouts(kept) if bar.end > start]:
        rows = {ROLLOUTS: rollouts} | rows
        end = max(end, rollouts[-1].end)
    return Timeline(start, end, rows)


def shares(found: Timeline) -> dict[str, dict[str, float]]:
    """Role -> part -> its share of the time of the role's steps; parts that took nothing are left out."""
    out: dict[str, dict[str, float]] = {}
    for role, bars in found.rows.items():
        whole = sum(bar.end - bar.start for bar in bars)
        if role == ROLLOUTS or whole <= 0:
            continue
        for part in (*PARTS, "other"):
            seconds = sum(bar.end - bar.start for bar in bars if bar.part == part)
            if seconds > 0:
                out.setdefault(role, {})[part] = seconds / whole
    return out


def _trainer(records: list[Mapping[str, Any]], role: str, last: int) -> list[Bar]:
    steps = [r for r in records if _number(r, f"{role}/time/step") is not None][-last:]
    bars: list[Bar] = []
    after = math.inf  # where the next step begins
    for record in reversed(steps):
        # Several records may be written at once, late for all but the last of their steps.
        left = _number(record, f"{role}/time/step") or 0.0
        end = min(float(record["time"]), after)
        at = after = end - left
        mine = []
        for part in (*PARTS, "other"):
            seconds = left if part == "other" else min(left, _number(record, f"{role}/time/{part}") or 0.0)
            left -= seconds
            if seconds > 0:
                mine.append(Bar(int(record["step"]), part, at, at + seconds))
            at += seconds
        bars = mine + bars
    return bars


def _rollouts(records: list[Mapping[str, Any]]) -> list[Bar]:
    """One bar for each version: from the end of the one before to the last worker's report of it."""
    found: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        if (share := _number(record, "rollout/perf/busy")) is not None:
            found.setdefault(int(record["step"]), []).append((float(record["time"]), share))
    bars: list[Bar] = []
    for step, reports in sorted(found.items()):
        end = max(time for time, _ in reports)
        start = bars[-1].end if bars else 0.0
        if end > start:
            share = sum(share for _, share in reports) / len(reports)
            bars.append(Bar(step, "busy", start, end, max(0.0, min(1.0, share))))
    return bars


def _cut(bar: Bar, start: float) -> Bar:
    return Bar(bar.step, bar.part, max(start, bar.start), bar.end, bar.share)


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    return None if value is None else float(value)


def as_text(found: Timeline, width: int = 60) -> list[str]:
    """One line of `width` signs for each row: the part that took most of the sign's time; of rollouts, how many places
    were taken."""
    signs = {part: sign for part, (sign, _) in SIGNS.items()}
    heights = "▁▂▃▄▅▆▇█"
    longest = max(map(len, found.rows))
    lines = []
    for name, bars in found.rows.items():
        text = ""
        for place in range(width):
            span = (found.end - found.start) / width
            first = found.start + place * span
            best = max(bars, key=lambda bar: min(bar.end, first + span) - max(bar.start, first))
            if best.end <= first or best.start >= first + span:
                text += " "
            elif name == ROLLOUTS:
                text += heights[min(7, int(best.share * 8))]
            else:
                text += signs[best.part]
        lines.append(f"{name:<{longest}}  {text}")
    shown = "".join(line[longest:] for line, name in zip(lines, found.rows, strict=True) if name != ROLLOUTS)
    key = "  ".join(f"{sign} {word}" for sign, word in SIGNS.values() if sign in shown)
    if ROLLOUTS in found.rows:
        key += ";  ▁▄█ places that hold a rollout"
    return [*lines, f"{'':<{longest}}  last {found.end - found.start:.0f} s: {key}"]
