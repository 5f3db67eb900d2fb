"""Bars of a comparison as inline SVG: floor, ours and rivals on one axis, linear or in decades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import takewhile
from typing import Any, Literal

Kind = Literal["floor", "ours", "rival", "plain"]
UNITS = ("ms", "s", "MB", "GB", "tokens/s", "steps/h", "/s", "MB/s")
"""Of figures that are drawn side by side where a bench compares nothing itself."""
MOST = 14  # bars of a picture
LEFT, WIDTH, ROW, RIGHT = 230, 640, 22, 100  # pixels: names, all, a bar, values
LETTERS = 34  # of a name; the whole one is its tooltip


@dataclass(slots=True)
class Picture:
    """Bars (name, value, kind) in one unit. more_is_better: rates, where the longest bar is the best."""

    title: str
    unit: str
    more_is_better: bool
    bars: list[tuple[str, float, Kind]] = field(default_factory=list)

    def lead(self) -> tuple[str, float] | None:
        """The best rival and how many times better ours is; None without rivals."""
        ours = next((v for _, v, kind in self.bars if kind == "ours"), 0.0)
        rivals = [(name, v) for name, v, kind in self.bars if kind == "rival" and v > 0]
        if not rivals or not ours > 0:
            return None
        leads = [(name, ours / v if self.more_is_better else v / ours) for name, v in rivals]
        return min(leads, key=lambda lead: lead[1])


def number(value: float) -> str:
    """Four digits; thousands are grouped."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def floor_word(more_is_better: bool) -> str:
    """A rate cannot be above what a time cannot be below."""
    return "ceiling" if more_is_better else "floor"


def pictures(bench: str, figures: Sequence[dict[str, Any]]) -> list[Picture]:
    """One for all that is compared with the same value of ours, and one for each other unit of several figures."""
    grouped: dict[tuple[float, str, bool], list[dict[str, Any]]] = {}
    for f in figures:
        if c := f.get("compared"):
            grouped.setdefault((c["ours"], c["unit"], c["more_is_better"]), []).append(f)
    found = [
        _compared(_title(bench, [f["item"] for f in group]), *key[1:], group)
        for key, group in grouped.items()
    ]
    found = [p for p in found if len(p.bars) > 1]
    rivals = {name for p in found for name, _, kind in p.bars if kind == "rival"}
    for unit in sorted(set(UNITS) - {p.unit for p in found}, key=UNITS.index):
        same = [f for f in figures if f["unit"] == unit and f["value"] > 0][:MOST]
        if len(same) > 1:
            found.append(_plain(bench, unit, same, rivals))
    return found


def _plain(bench: str, unit: str, figures: Sequence[dict[str, Any]], rivals: set[str]) -> Picture:
    """Figures of one unit; what all their items begin with is the picture's title and not each bar's."""
    common = _common([f["item"] for f in figures])
    cut = common[: common.rfind(": ") + 2] if ": " in common else ""
    names = [f["item"].removeprefix(cut) for f in figures]
    bars: list[tuple[str, float, Kind]] = [
        (name, f["value"], "ours" if name.startswith("ours") else "rival" if name in rivals else "plain")
        for name, f in zip(names, figures, strict=True)
    ]
    title = f"{bench.removeprefix('bench_')}: {common.strip(' ,:/') or unit}"
    return Picture(title, unit, unit.endswith("/s"), bars)


def _compared(title: str, unit: str, more: bool, group: Sequence[dict[str, Any]]) -> Picture:
    floors: dict[str, float] = {}
    rivals: dict[str, float] = {}
    for f in group:
        c = f["compared"]
        if c["floor"] is not None:
            floors[c["floor_name"] or "floor"] = c["floor"]
        rivals |= c["rivals"]
    bars: list[tuple[str, float, Kind]] = [
        (f"{floor_word(more)}: {name}", v, "floor") for name, v in floors.items()
    ]
    bars.append(("ours", group[0]["compared"]["ours"], "ours"))
    ranked = sorted(rivals.items(), key=lambda r: r[1], reverse=more)
    return Picture(title, unit, more, bars + [(name, v, "rival") for name, v in ranked[:MOST]])


def _title(bench: str, items: Sequence[str]) -> str:
    """The bench and what its items have in common at their beginning or their end."""
    bench = bench.removeprefix("bench_")
    if len(items) == 1:
        return f"{bench}: {items[0]}"
    first = _common(items).strip(" ,:/")
    last = _common([item[::-1] for item in items])[::-1].removeprefix(" / ours").strip(" ,:/")
    return ": ".join([bench, *dict.fromkeys(part for part in (first, last) if len(part) > 1)])


def _common(items: Sequence[str]) -> str:
    """What all items begin with."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*items, strict=False))
    return "".join(letters[0] for letters in same)


def svg(picture: Picture) -> str:
    """The picture with its names, values and a grid. Values that are not above 0 have no bar."""
    shown = [v for _, v, _ in picture.bars if math.isfinite(v) and v > 0]
    if not shown:
        return ""
    scale, marks = _axis(min(shown), max(shown))
    room, height = WIDTH - LEFT - RIGHT, ROW * len(picture.bars) + 24
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(picture.title, quote=True)}">'
    ]
    for mark in marks:
        x = LEFT + room * scale(mark)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{height - 6}">{number(mark)}</text>')
    for row, (name, value, kind) in enumerate(picture.bars):
        y = row * ROW
        long = max(1.5, room * scale(value)) if math.isfinite(value) and value > 0 else 0.0
        parts.append(_name(name, LEFT - 8, y + 15, kind))
        parts.append(
            f'<rect class="{kind}" x="{LEFT}" y="{y + 4}" width="{long:.1f}" height="{ROW - 8}" rx="2"/>'
        )
        text = f"{number(value)} {picture.unit}".strip()
        parts.append(f'<text class="value" x="{LEFT + long + 5:.1f}" y="{y + 15}">{escape(text)}</text>')
    return "".join([*parts, "</svg>"])


def leads_svg(leads: Sequence[tuple[str, str, float]]) -> str:
    """(what, best rival, how many times better ours is), on decades around 1: to the right ours is better."""
    leads = [lead for lead in leads if math.isfinite(lead[2]) and lead[2] > 0]
    if not leads:
        return ""
    high = max(2.0, *(max(v, 1 / v) for *_, v in leads))
    low = min(0.8, *(v for *_, v in leads))
    span = math.log(high / low)
    wide, left, right = 980, 420, 70
    room, height = wide - left - right, ROW * len(leads) + 24

    def at(value: float) -> float:
        return left + room * math.log(value / low) / span

    parts = [f'<svg viewBox="0 0 {wide} {height}" role="img" aria-label="best rival over ours">']
    for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000):
        if low <= mark <= high:
            kind = "one" if mark == 1 else "grid"
            parts.append(
                f'<line class="{kind}" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="0" y2="{height - 20}"/>'
            )
            parts.append(f'<text class="axis" x="{at(mark):.1f}" y="{height - 6}">{mark:g}x</text>')
    for row, (what, rival, value) in enumerate(leads):
        y, (a, b) = row * ROW, sorted((at(1.0), at(value)))
        kind = "ours" if value >= 1 else "behind"
        parts.append(_name(f"{what}  (best: {rival})", left - 8, y + 15, "plain", 64))
        parts.append(
            f'<rect class="{kind}" x="{a:.1f}" y="{y + 4}" width="{max(1.5, b - a):.1f}" height="{ROW - 8}" rx="2"/>'
        )
        parts.append(f'<text class="value" x="{b + 5:.1f}" y="{y + 15}">{number(value)}x</text>')
    return "".join([*parts, "</svg>"])


def _name(text: str, x: float, y: float, kind: Kind, letters: int = LETTERS) -> str:
    short = text if len(text) <= letters else text[: letters - 1] + "…"
    weight = ' font-weight="600"' if kind == "ours" else ""
    whole = f"<title>{escape(text)}</title>"
    return f'<text class="name" x="{x}" y="{y}"{weight}>{whole}{escape(short)}</text>'


def _axis(low: float, high: float) -> tuple[Any, list[float]]:
    """A value's place from 0 to 1 and the marks: from zero where the bars differ little, in decades otherwise."""
    if high <= 12 * low:
        step = 10 ** math.floor(math.log10(high))
        step = next(s for s in (step / 5, step / 2, step, 2 * step) if high / s <= 5.5)
        return (lambda v: v / high), [i * step for i in range(int(high / step * 1.0001) + 1)]
    start = 10 ** math.floor(math.log10(low / 1.5))
    span = math.log(high / start)
    first, last = round(math.log10(start)), math.floor(math.log10(high))
    every = max(1, (last - first) // 5)
    marks = [10.0**e for e in range(first, last + 1, every)]
    return (lambda v: math.log(v / start) / span if v > start else 0.0), marks
