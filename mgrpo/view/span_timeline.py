"""The timeline of the last steps from spans: what each process did, rollout by rollout, and what took longest.

A trainer has a row for its loop, with the parts of its steps, and thin ones for what runs beside it. A rollout worker
has one for evaluations, waiting and weights, and a line for each place that a rollout can hold, the rollouts that
follow each other on it, their turns and tool calls inside them. A rollout that has not ended is there as far as its
tool calls and its earlier attempts are known: turns are recorded when their attempt ends. Arrows lead from the
publication of a version to each load of it.

What is sent to a browser is bounded: LINES lines, BARS bars, BYTES bytes of bars. Where there is more, the lines with
the longest rollouts are drawn, and the shortest turns go first, then tool calls and stages; `words` says what is not
drawn. The lists of what was slowest are of all spans.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgrpo.record.span_reader import SpanReader, absent, gaps
from mgrpo.record.spans import MAIN_LANE, Args, Span
from mgrpo.trace.arrows import loads
from mgrpo.trace.layout import ROLLOUT_KINDS, tracks
from mgrpo.trace.slowest import slowest
from mgrpo.view.timeline import STEPS, Timeline

LINES, WORKER_LINES = 240, 120
BARS, BYTES, ARROWS = 8000, 800_000, 300
SLOWEST = 10
NAME = 60  # characters of a name, which a task or a tool may have chosen
BEFORE_A_STEP_NS = 600 * 10**9  # shown while no step has ended
LOOKS = 5  # how often the window is made twice as long to find the steps
REST = 10  # a page that follows a run costs the server at most a tenth of a core
PREFIX = "trainer "
_LATER = {"turn": 3, "sub_turn": 3, "tool": 2, "stage": 2}  # what is left out first where there is too much
_LIST_KINDS = {"rollouts": "rollout", "turns": "turn", "tool calls": "tool"}
Json = dict[str, Any]


@dataclass(slots=True)
class Bar:
    """Something that is drawn. start, length: microseconds, from the window's start on. row: of those that share a
    line. rollout: its id where the bar opens its tree. is_slow: one of the slowest rollouts, which stand out."""

    span: Span
    part: str
    start: int
    length: int
    row: int = 0
    rollout: str | None = None
    is_slow: bool = False
    shown: list[Any] = field(default_factory=list)  # what is sent, once it is known that the bar is drawn

    def show(self) -> list[Any]:
        words = detail(self.span)
        self.shown = [self.part, self.start, self.length, words, self.row, self.rollout, int(self.is_slow)]
        return self.shown


@dataclass(slots=True)
class Row:
    """A line of the picture. size: "main", "thin" or "line" (of rollouts). rows: how many stand in it side by side."""

    name: str
    size: str
    bars: list[Bar]
    rows: int = 1

    def as_json(self) -> Json:
        return {
            "name": self.name,
            "size": self.size,
            "rows": self.rows,
            "bars": [bar.shown for bar in self.bars],
        }


class SpanTimeline:
    """The timeline of a run that may still grow. Not thread-safe."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._reader: SpanReader | None = (
            None  # opened with the first look: a page may open before it has read all
        )
        self._known: Json | None = None
        self._made_at, self._took = 0.0, 0.0

    def notes(self) -> list[str]:
        """A line for each gap in the spans, and for each file that could not be read up to now."""
        return self._reader.notes() if self._reader else gaps([self._run])

    def read(self, steps: Timeline | None, is_recorded: Callable[[str], bool]) -> Json | None:
        """None where no spans were recorded. steps: the metrics' timeline of the same steps; is_recorded: whether a
        rollout's tree can be shown."""
        began = time.monotonic()
        if self._known is not None and began - self._made_at < REST * self._took:
            return self._known
        self._reader = self._reader or SpanReader([self._run])
        if self._reader.refresh() or self._known is None:
            found = window(self._reader, steps)
            self._known = found and picture(*found, is_recorded)
            if found and self._known:
                self._known["words"] += [
                    clip(w, 4 * NAME) for w in absent(self._reader.processes(), found[0])
                ]
            self._made_at = time.monotonic()
            self._took = self._made_at - began
        return self._known


def window(reader: SpanReader, steps: Timeline | None) -> tuple[dict[str, list[Span]], int, int, int] | None:
    """(process -> its spans within the last steps, start of the run, start and end of the window in Unix ns).

    Bodies of older spans are not read: how far back the steps are is taken from the metrics, and looked further for
    only where spans reach further (a step that is under way, or an earlier start of the run)."""
    bounds = reader.bounds()
    if bounds is None:
        return None
    first, last = bounds
    wanted = (
        {PREFIX + role: len({b.step for b in bars}) for role, bars in steps.rows.items()} if steps else {}
    )
    reach = int((steps.end - steps.start) * 1.2e9) + 10**9 if steps else BEFORE_A_STEP_NS
    found: dict[str, list[Span]] = {}
    for _ in range(LOOKS):
        found = reader.spans(last - reach)
        known = {process: sum(s.kind == "step" for s in spans) for process, spans in found.items()}
        if last - reach <= first or all(known.get(process, 0) >= n for process, n in wanted.items()):
            break
        reach *= 2
    starts = [
        sorted(s.start for s in spans if s.kind == "step")[-STEPS:]
        for spans in found.values()
        if any(s.kind == "step" for s in spans)
    ]
    start = min((own[0] for own in starts), default=max(first, last - reach))
    kept = {
        process: [s for s in spans if s.end > start or s.start >= start] for process, spans in found.items()
    }
    return {process: spans for process, spans in kept.items() if spans}, first, start, last


def picture(
    spans: Mapping[str, Sequence[Span]], first: int, start: int, end: int, is_recorded: Callable[[str], bool]
) -> Json:
    """What the page draws of a window; seconds count from `first` on, the run's start."""
    trainers = [p for p in spans if p.startswith(PREFIX)]
    workers = [p for p in spans if not p.startswith(PREFIX)]
    limit = max(1, min(WORKER_LINES, LINES // max(1, len(workers))))
    rows: dict[str, list[Row]] = {}
    words: list[str] = []
    slow = {(span.lane, span.start) for _, span in slowest(spans, "rollout", SLOWEST)}
    for process in workers:
        rows[process], left = _worker(spans[process], start, limit, slow, is_recorded)
        if left:
            words.append(
                f"{clip(process)}: {left} lines of rollouts are not drawn, those whose longest rollout is shortest"
            )
    for process in trainers:
        rows[process] = _trainer(spans[process], start)
    words += cut([row for own in rows.values() for row in own])
    arrows, backwards = _arrows(spans, start)
    if backwards:
        words.append(
            f"{backwards} arrows would go back in time and are not drawn: the servers' clocks differ"
        )
    if len(arrows) > ARROWS:
        words.append(f"{len(arrows) - ARROWS} arrows of earlier versions are not drawn")
    return {
        "kind": "spans",
        "start": (start - first) / 1e9,
        "end": (end - first) / 1e9,
        "processes": [
            {"name": clip(p, 2 * NAME), "rows": [row.as_json() for row in own]} for p, own in rows.items()
        ],
        "arrows": arrows[-ARROWS:],
        "words": words,
        "slowest": {
            title: _slowest(spans, kind, first, start, is_recorded) for title, kind in _LIST_KINDS.items()
        },
    }


# -- rows ----------------------------------------------------------------------------------------------------------


def _trainer(spans: Sequence[Span], start: int) -> list[Row]:
    found = []
    stages = [s for s in spans if s.kind == "stage"]
    for track in tracks([s for s in spans if s.kind != "stage"]):
        is_main = track.name == MAIN_LANE
        bars = [_bar(s, start, s.kind) for s in track.spans]
        found.append(Row(clip(track.name), "main" if is_main else "thin", bars))
        if is_main and stages:
            found.append(Row("stages", "thin", [_bar(s, start, "stage") for s in stages]))
    return found


def _worker(
    spans: Sequence[Span],
    start: int,
    limit: int,
    slow: Container[tuple[str, int]],
    is_recorded: Callable[[str], bool],
) -> tuple[list[Row], int]:
    """(rows, how many lines are left out). The first row is that of evaluations, waiting and weights. slow: lane and
    start of the rollouts that stand out."""
    others = [s for s in spans if s.kind not in ROLLOUT_KINDS]
    rows = [Row("", "thin", [_bar(s, start, s.kind) for s in others])]
    played = _with_open_ends([s for s in spans if s.kind in ROLLOUT_KINDS])
    places = tracks([s for s in played if s.kind == "rollout"])
    left = max(0, len(places) - limit)
    if left:  # whole places are left out, so those that are kept need no more than before
        places.sort(key=lambda place: -max(s.end - s.start for s in place.spans))
        lanes = {s.lane for place in places[:limit] for s in place.spans}
        played = [s for s in played if s.lane in lanes]
    for track in tracks(played):
        if track.depth == 0:
            rows.append(Row(track.name, "line", [], 0))
        for s in track.spans:
            if s.kind == "invocation":
                continue  # its turns are drawn; what lies between them is its rollout's
            bar = _bar(s, start, _part(s), rows[-1].rows)
            if s.kind == "rollout":
                bar.rollout = s.lane if is_recorded(s.lane) else None
                bar.is_slow = (s.lane, s.start) in slow
            rows[-1].bars.append(bar)
        rows[-1].rows += 1
    return rows, left


def _with_open_ends(spans: list[Span]) -> list[Span]:
    """Rollouts that are under way, or whose worker was killed, have calls but no span of their own: one is added."""
    ended: dict[str, list[Span]] = {}
    for span in spans:
        if span.kind == "rollout":
            ended.setdefault(span.lane, []).append(span)
    open_: dict[str, tuple[int, int]] = {}
    for span in spans:
        if span.kind != "rollout" and not any(
            r.start <= span.start <= r.end for r in ended.get(span.lane, ())
        ):
            known = open_.get(span.lane, (span.start, span.end))
            open_[span.lane] = min(known[0], span.start), max(known[1], span.end)
    return spans + [Span("rollout", lane, lane, a, b, {"status": "open"}) for lane, (a, b) in open_.items()]


def _part(span: Span) -> str:
    """How a span of a rollout is coloured."""
    args = span.args
    if span.kind == "rollout":
        status = args.get("status")
        if status in ("failed", "open"):
            return str(status)
        return "played" if args.get("split", "train") == "train" else "evaluated"
    if span.kind == "turn":
        return "turn" if args.get("role", "main") == "main" else "sub_turn"
    return span.kind


def _bar(span: Span, start: int, part: str, row: int = 0) -> Bar:
    begin = max(span.start, start)
    return Bar(span, part, (begin - start) // 1000, max(0, span.end - begin) // 1000, row)


def _arrows(spans: Mapping[str, Sequence[Span]], start: int) -> tuple[list[list[Any]], int]:
    """([trainer, microseconds, worker, microseconds, words] of each publication and each load of what it published, by
    time; how many are left out because the load began before the publication)."""
    arrows, backwards = [], 0
    for trainer, source, process, load in loads(spans):
        if load.start < source.start:
            backwards += 1
            continue
        # A worker may load what is served before the publication has ended.
        ends = [max(0, t - start) // 1000 for t in (min(source.end, load.start), load.start)]
        words = f"{clip(load.lane.partition(' ')[2])}, version {clip(load.args.get('version', '?'))}"
        arrows.append([clip(trainer, 2 * NAME), ends[0], clip(process, 2 * NAME), ends[1], words])
    return sorted(arrows, key=lambda arrow: arrow[1]), backwards


def cut(rows: Sequence[Row]) -> list[str]:
    """Take bars out until the rest fits, and make those that are drawn ready; returns what was taken, in words."""
    bars = [bar for row in rows for bar in row.bars]
    bars.sort(key=lambda bar: (_LATER.get(bar.part, 0), -bar.length))
    size = kept = 0
    for bar in bars[:BARS]:
        size += len(json.dumps(bar.show())) + 2
        if size > BYTES:
            break
        kept += 1
    dropped: dict[str, int] = {}
    gone = {id(bar) for bar in bars[kept:]}
    for bar in bars[kept:]:
        kind = {"turn": "turns", "sub_turn": "turns", "tool": "tool calls", "stage": "stages"}.get(
            bar.part, "others"
        )
        dropped[kind] = dropped.get(kind, 0) + 1
    if not gone:
        return []
    for row in rows:
        row.bars = [bar for bar in row.bars if id(bar) not in gone]
    return ["the shortest are not drawn: " + ", ".join(f"{n} {kind}" for kind, n in dropped.items())]


# -- words ---------------------------------------------------------------------------------------------------------


def clip(text: object, length: int = NAME) -> str:
    shown = str(text)
    return shown if len(shown) <= length else shown[:length] + "…"


def detail(span: Span) -> str:
    """What the page says about a span beside its kind and its seconds."""
    args, parts = span.args, []
    if span.kind == "turn":
        parts.append(f"{clip(args.get('role', span.name))} {_number(args, 'invocation') + 1:.0f}")
        parts.append(f"turn {_number(args, 'turn') + 1:.0f}")
        context = f" after a context of {_number(args, 'context'):.0f}" if "context" in args else ""
        parts += [f"{_number(args, 'sampled'):.0f} tokens{context}"] if "sampled" in args else []
    elif span.kind in ("rollout", "tool", "stage", "read", "build"):
        parts.append(clip(span.name))
    elif span.kind in ("fetch", "update"):
        parts.append(clip(span.lane.partition(" ")[2]))
    if "step" in args:
        parts.append(f"step {clip(args['step'])}")
    if "version" in args:
        parts.append(f"version {clip(args['version'])}")
    if args.get("failed_by"):
        parts.append(clip(args["failed_by"]))
    if args.get("failed") or args.get("status") == "failed":
        parts.append("failed")
    for name in ("attempts", "retries"):
        if (times := _number(args, name)) > (name == "attempts"):
            parts.append(f"{times:.0f} {name}")
    return ", ".join(parts)


def _number(args: Args, name: str) -> float:
    value = args.get(name, 0)
    return value if isinstance(value, int | float) else 0


def _slowest(
    spans: Mapping[str, Sequence[Span]], kind: str, first: int, start: int, is_recorded: Callable[[str], bool]
) -> list[Json]:
    found = slowest(spans, kind, SLOWEST)
    made_of = _contents(spans, found, start) if kind == "rollout" else {}
    return [
        {
            "seconds": (span.end - span.start) / 1e9,
            "at": (span.start - first) / 1e9,
            "words": made_of.get((span.lane, span.start)) or detail(span),
            "process": clip(process),
            "rollout": span.lane if is_recorded(span.lane) else None,
            "lane": clip(span.lane),
        }
        for process, span in found
    ]


def _contents(
    spans: Mapping[str, Sequence[Span]], rollouts: Iterable[tuple[str, Span]], start: int
) -> dict[tuple[str, int], str]:
    """What the seconds of each rollout were, summed over what ran at once."""
    inside = {span.lane: [span] for _, span in rollouts}
    for span in (s for own in spans.values() for s in own if s.lane in inside and s.kind in ("turn", "tool")):
        inside[span.lane].append(span)
    words = {}
    for _, rollout in rollouts:
        parts = [
            detail(rollout).partition(", ")[2],
            "began before them; since then" if rollout.start < start else "",
        ]
        for kind, title in (("turn", "turns"), ("tool", "tool calls")):
            took = [
                s.end - s.start
                for s in inside[rollout.lane]
                if s.kind == kind and rollout.start <= s.start <= rollout.end
            ]
            parts += [f"{len(took)} {title} {sum(took) / 1e9:.2f} s"] if took else []
        words[rollout.lane, rollout.start] = ", ".join(filter(None, parts))
    return words
