"""The page of all benches as one HTML file: summary, what was missed, leads over rivals, a section of each bench."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bench.report_bars import Picture, floor_word, leads_svg, number, pictures, svg
from bench.running import Outcome

STYLE = """
:root { color-scheme: light dark;
  --page: light-dark(#ffffff, #14171b); --panel: light-dark(#f5f6f8, #1d2126); --line: light-dark(#d5d9df, #39404a);
  --text: light-dark(#1b1f24, #e4e7eb); --quiet: light-dark(#59636e, #9aa5b1); --ours: light-dark(#0b5cad, #76b4f5);
  --rival: light-dark(#c9772b, #d99a5b); --floor: light-dark(#9aa3ad, #6b7580); --good: light-dark(#0a6b3d, #5fcf94);
  --bad: light-dark(#b3261e, #ff8a80); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 0 18px 60px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 20px 0 2px; } h2 { font-size: 18px; margin: 38px 0 2px; }
h3 { font-size: 13px; margin: 0 0 4px; color: var(--quiet); font-weight: 600; }
p { margin: 3px 0; } a { color: var(--ours); text-decoration: none; } a:hover { text-decoration: underline; }
.quiet { color: var(--quiet); } .good, .pass { color: var(--good); }
.bad, .miss { color: var(--bad); font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 8px 16px;
  min-width: 118px; }
.tile b { display: block; font-size: 24px; line-height: 1.2; }
.wide { overflow-x: auto; } .pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr));
  gap: 12px; margin: 10px 0; }
.picture { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 8px 0; }
th { text-align: left; color: var(--quiet); font-weight: 600; border-bottom: 2px solid var(--line); padding: 4px 8px; }
td { border-bottom: 1px solid var(--line); padding: 4px 8px; vertical-align: top; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.ratio { font-weight: 600; } td small { color: var(--quiet); display: block; white-space: normal; }
tr.missed td { background: color-mix(in srgb, var(--bad) 9%, transparent); }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 8px; overflow-x: auto;
  font-size: 12.5px; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } svg .name { text-anchor: end; } svg .axis { text-anchor: middle; fill: var(--quiet);
  font-size: 10.5px; } svg .value { font-variant-numeric: tabular-nums; font-size: 11.5px; }
svg .grid { stroke: var(--line); } svg .one { stroke: var(--quiet); stroke-width: 1.5; }
rect.ours { fill: var(--ours); } rect.rival { fill: var(--rival); } rect.floor { fill: var(--floor); }
rect.plain { fill: var(--floor); } rect.behind { fill: var(--bad); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 12px; }
@media (max-width: 640px) { .pictures { grid-template-columns: 1fr; } }
"""
KEYS = (("floor", "floor"), ("ours", "ours"), ("rival", "rivals"))


@dataclass(frozen=True, slots=True)
class Heading:
    """What the page says about the whole run. seconds: wall time of it."""

    date: str
    commit: str
    machine: dict[str, str]
    what: str
    seconds: float


def page(heading: Heading, outcomes: Sequence[Outcome]) -> str:
    """The whole file. Every name, unit and note is escaped."""
    drawn = {o.name: pictures(o.name, o.figures) for o in outcomes}
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>mgrpo benches, {escape(heading.commit)}</title><style>{STYLE}</style>",
        "<h1>mgrpo benches</h1>",
        f"<p>{escape(_machine(heading.machine))}</p>",
        f'<p class="quiet">{escape(heading.date)}, commit {escape(heading.commit)}, {escape(heading.what)}, '
        f"{_duration(heading.seconds)} in all</p>",
        _tiles(outcomes),
        _overview(outcomes),
        _leads(drawn),
    ]
    parts += [_section(o, drawn[o.name], heading.machine) for o in outcomes]
    return "\n".join(parts) + "\n</html>\n"


def _machine(found: dict[str, str]) -> str:
    known = [
        found.get("cpu", "unknown processor"),
        f"Python {found.get('python', '?')}",
        found.get("system", ""),
    ]
    return ", ".join(x for x in known if x)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _count(outcomes: Sequence[Outcome], verdict: str) -> int:
    return sum(f.get("verdict") == verdict for o in outcomes for f in o.figures)


def _tiles(outcomes: Sequence[Outcome]) -> str:
    ran = sum(o.status == "ok" for o in outcomes)
    missed, failed = _count(outcomes, "miss"), len(outcomes) - ran
    tiles = [
        (str(_count(outcomes, "pass")), "bounds held", "good"),
        (str(missed), "bounds missed", "bad" if missed else "quiet"),
        (str(ran), "benches run", ""),
        (str(failed), "failed or not run", "bad" if failed else "quiet"),
    ]
    cells = (f'<div class="tile {kind}"><b>{n}</b>{what}</div>' for n, what, kind in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _overview(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for o in outcomes:
        passed, missed = _count([o], "pass"), _count([o], "miss")
        state = "" if o.status == "ok" else f'<span class="bad">{escape(o.status)}</span>: {escape(o.reason)}'
        names = ", ".join(f["item"] for f in o.figures if f.get("verdict") == "miss")
        took = _duration(o.seconds) if o.seconds else ""
        rows.append(
            f'<tr><td><a href="#{escape(o.name, quote=True)}">{escape(o.name)}</a></td><td class="n">{took}</td>'
            f'<td class="n">{len(o.figures) or ""}</td><td class="n pass">{passed or ""}</td>'
            f'<td class="n miss">{missed or ""}</td><td>{state}{escape(names)}</td></tr>'
        )
    head = '<tr><th>bench<th class="n">took<th class="n">figures<th class="n">held<th class="n">missed<th>which</tr>'
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _leads(drawn: dict[str, list[Picture]]) -> str:
    """Each comparison's best rival over ours, over all benches."""
    found = [(p.title, *lead) for each in drawn.values() for p in each if (lead := p.lead()) is not None]
    picture = leads_svg(found)
    if not picture:
        return ""
    return (
        '<h2>Best rival over ours</h2><p class="quiet">How many times faster, smaller or more than the best rival of '
        f'the same run; left of 1x the rival is better.</p><div class="picture">{picture}</div>'
    )


def _section(o: Outcome, drawn: Sequence[Picture], machine: dict[str, str]) -> str:
    about = _about(o.name)
    parts = [f'<h2 id="{escape(o.name, quote=True)}">{escape(o.name)}</h2>']
    if about:
        parts.append(f'<p class="quiet">{escape(about)}</p>')
    if o.machine and o.machine != machine:
        parts.append(f"<p>Measured on {escape(_machine(o.machine))}</p>")
    if o.status != "ok":
        parts.append(f'<p><span class="bad">{escape(o.status)}</span>: {escape(o.reason)}</p>')
    parts += [f'<p class="quiet">{escape(remark)}</p>' for remark in o.remarks]
    if o.tail:
        parts.append(f"<pre>{escape(o.tail)}</pre>")
    shown = [(p, svg(p)) for p in drawn]
    boxes = "".join(
        f'<div class="picture"><h3>{escape(p.title)}</h3>{image}</div>' for p, image in shown if image
    )
    if boxes:
        keys = "".join(f'<span class="key" style="background:var(--{k})"></span>{name}' for k, name in KEYS)
        parts.append(f'<p class="quiet">{keys}</p><div class="pictures">{boxes}</div>')
    if o.figures:
        names = ("figure", "floor", "best rival", "ours, or value", "ratio", "bound", "", "note")
        aligned = (f"<th{' class=n' if name in names[1:6] else ''}>{name}" for name in names)
        head = f"<tr>{''.join(aligned)}</tr>"
        parts.append(f'<div class="wide"><table>{head}{"".join(map(_row, o.figures))}</table></div>')
    return "".join(parts)


def _row(f: dict[str, Any]) -> str:
    c: dict[str, Any] = f.get("compared") or {}
    unit = c.get("unit", "")
    value = f"{number(f['value'])} {f.get('unit', '')}".strip()
    is_ratio = bool(c) or (f.get("unit") in ("x", "") and " / " in f["item"])
    cells = [f"<td>{escape(f['item'])}</td>"]
    cells.append(_value(c.get("floor"), unit, c.get("floor_name", "")))
    rival = c.get("best_rival", "")
    cells.append(_value(c.get("rivals", {}).get(rival), unit, rival))
    cells.append(_value(c.get("ours"), unit) if is_ratio else f'<td class="n">{escape(value)}</td>')
    ratio = escape(value) if is_ratio else ""
    if c.get("of_floor") is not None and c.get("rivals"):
        ratio += f"<small>{number(c['of_floor'])} x from {floor_word(c['more_is_better'])}</small>"
    cells.append(f'<td class="n ratio">{ratio}</td>')
    verdict = str(f.get("verdict", ""))
    cells.append(
        f'<td class="n">{escape(_bound(f))}</td><td class="{escape(verdict, quote=True)}">{escape(verdict)}</td>'
    )
    cells.append(f"<td>{escape(str(f.get('note', '')))}</td>")
    return f"<tr{' class=missed' if verdict == 'miss' else ''}>{''.join(cells)}</tr>"


def _value(value: float | None, unit: str, name: str = "") -> str:
    if value is None:
        return '<td class="n"></td>'
    below = f"<small>{escape(name)}</small>" if name else ""
    return f'<td class="n">{escape(f"{number(value)} {unit}".strip())}{below}</td>'


def _bound(f: dict[str, Any]) -> str:
    sides = (("≤", f.get("at_most")), ("≥", f.get("at_least")))
    return ", ".join(f"{sign} {number(float(bound))}" for sign, bound in sides if bound is not None)


def _about(name: str) -> str:
    """First line of the bench's docstring; nothing is imported."""
    path = Path(__file__).parent / f"{name}.py"
    if not name.isidentifier() or not path.exists():
        return ""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
