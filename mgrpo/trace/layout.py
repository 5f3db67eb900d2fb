"""Where the spans of a process are drawn: tracks in which every two spans are either nested or apart.

Most lanes are one track. Spans of a lane that overlap without nesting were concurrent and take further tracks, each
span the first that it fits. Rollouts have a lane each, thousands of them: those that are played at once take numbered
places instead, the lowest that is free, and leave them at their end. Inside of a place

1. a rollout, its main agent's invocation and turns are on the place's own track;
2. every other invocation goes there as well, with all its turns, where nothing else happens meanwhile; sub-agents that
   run in parallel have a track below the place;
3. a tool call goes to the first track on which an invocation is open and no turn or other call is running.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from mgrpo.record.spans import AHEAD_LANE, EVALUATION_LANE, MAIN_LANE, RECORD_LANE, Span

ROLLOUT_KINDS = frozenset({"rollout", "invocation", "turn", "tool"})
_LANES = (MAIN_LANE, AHEAD_LANE, RECORD_LANE, EVALUATION_LANE)
# Of two spans with the same times the one to the left is the outer one.
_OUTER = {
    kind: rank
    for rank, kind in enumerate(
        ("evaluation", "step", "rollout", "train", "invocation", "turn", "tool", "publish", "stage")
    )
}


@dataclass(frozen=True, slots=True)
class Track:
    """A row of the timeline. depth: 0 is a lane or a place, 1 what ran beside it. spans: nested, none of them ends
    before it starts, by start, the outer one first."""

    name: str
    depth: int
    spans: list[Span]


def tracks(spans: Sequence[Span]) -> list[Track]:
    """The tracks of one process, in the order in which they are drawn, a lane's further tracks after it. Each span is
    on exactly one of them; a span whose end is before its start ends at its start."""
    lanes: dict[str, list[Span]] = {}
    rollouts: dict[str, list[Span]] = {}
    for span in sorted(map(forward, spans), key=_order):
        (rollouts if span.kind in ROLLOUT_KINDS else lanes).setdefault(span.lane, []).append(span)
    known = [lane for lane in _LANES if lane in lanes]
    found: list[Track] = []
    for lane in known + sorted(lanes.keys() - set(known)):
        found += _named(lane, nested(lanes[lane]))
    return found + _places(rollouts)


def forward(span: Span) -> Span:
    """The span itself, or where it ends before it starts one without length."""
    if span.end >= span.start:
        return span
    return Span(span.kind, span.name, span.lane, span.start, span.start, span.args)


def nested(spans: Sequence[Span]) -> list[list[Span]]:
    """Rows of spans that are nested or apart: each span is on the first row that it fits. spans: by start, the outer
    one first."""
    rows: list[list[Span]] = []
    stacks: list[list[int]] = []  # per row: the ends of the spans that are open, outermost first
    for span in spans:
        row = next((i for i, stack in enumerate(stacks) if _fits(span, stack)), len(rows))
        if row == len(rows):
            rows.append([])
            stacks.append([])
        rows[row].append(span)
        stacks[row].append(span.end)
    return rows


def _fits(span: Span, open_: list[int]) -> bool:
    """Whether a span is within the innermost open one; takes those that have ended off."""
    while open_ and open_[-1] <= span.start:
        open_.pop()
    return not open_ or span.end <= open_[-1]


def depths(spans: Sequence[Span]) -> list[int]:
    """How many spans of a track are around each of its spans."""
    stack: list[int] = []
    found = []
    for span in spans:
        while stack and stack[-1] <= span.start:
            stack.pop()
        found.append(len(stack))
        stack.append(span.end)
    return found


def _order(span: Span) -> tuple[int, int, int]:
    return span.start, -span.end, _OUTER.get(span.kind, len(_OUTER))


def _named(name: str, rows: Sequence[list[Span]]) -> list[Track]:
    return [Track(name if not i else f"{name} / {i + 1}", min(i, 1), row) for i, row in enumerate(rows)]


def _places(lanes: dict[str, list[Span]]) -> list[Track]:
    pieces = [piece for lane in lanes.values() for piece in _pieces(lane)]
    pieces.sort(key=lambda piece: piece[0].start)
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (end, place)
    rows: list[list[list[Span]]] = []  # place -> row -> spans
    for piece in pieces:
        while busy and busy[0][0] <= piece[0].start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, len(rows))
            rows.append([])
        place = heapq.heappop(free)
        heapq.heappush(busy, (max(span.end for span in piece), place))
        for i, row in enumerate(_rollout_rows(piece)):
            if i == len(rows[place]):
                rows[place].append([])
            rows[place][i] += row
    return [track for i, place in enumerate(rows) for track in _named(f"place {i + 1}", place)]


def _pieces(spans: Sequence[Span]) -> list[list[Span]]:
    """A lane, cut where the same rollout is played once more, as after a restart."""
    pieces: list[list[Span]] = []
    end, whole = 0, False
    for span in spans:
        if not pieces or (span.start >= end and (whole or span.kind == "rollout")):
            pieces.append([])
            end, whole = 0, False
        pieces[-1].append(span)
        end = max(end, span.end)
        whole |= span.kind == "rollout"
    return pieces


@dataclass(slots=True)
class _Unit:
    """An invocation with its turns."""

    spans: list[Span] = field(default_factory=list)
    end: int = 0

    def add(self, span: Span) -> None:
        self.spans.append(span)
        self.end = max(self.end, span.end)


def _rollout_rows(piece: Sequence[Span]) -> list[list[Span]]:
    units: dict[tuple[object, ...], _Unit] = {}
    tools = []
    rows: list[list[Span]] = [[]]
    for span in piece:
        if span.kind == "rollout":
            rows[0].append(span)
        elif span.kind == "tool":
            tools.append(span)
        else:
            key = tuple(span.args.get(name) for name in ("role", "invocation", "attempt"))
            units.setdefault(key, _Unit()).add(span)
    for unit in units.values():  # by start, since the spans are
        first = unit.spans[0].start
        for row in rows:
            if _is_free(row, first, unit.end, ("turn", "tool")):
                break
        else:
            rows.append(row := [])
        row += unit.spans
    for tool in tools:
        fitting = [row for row in rows if _is_free(row, tool.start, tool.end, ("turn", "tool"))]
        # The row whose invocation asked for it: the calls of parallel sub-agents do not say whose they are.
        open_ = [
            r for r in fitting if any(s.kind == "invocation" and s.start <= tool.start < s.end for s in r)
        ]
        if open_ or fitting:
            (open_ or fitting)[0].append(tool)
        else:
            rows.append([tool])
    return [row for found in rows if found for row in nested(sorted(found, key=_order))]


def _is_free(row: Sequence[Span], start: int, end: int, closed: Sequence[str]) -> bool:
    """Whether every span of a row is apart from start .. end or around it, and none of those around is `closed`."""
    return all(
        s.end <= start or s.start >= end or (s.start <= start and s.end >= end and s.kind not in closed)
        for s in row
    )
