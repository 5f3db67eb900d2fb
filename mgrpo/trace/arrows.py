"""What led to what, as arrows between spans: weights on their way to the turns they are sampled from, and rollouts on
their way into the steps that train on them.

    publish -> update     of the same label, in every rollout worker that has loaded it
    update -> turn        the first turn of the role in that worker which was sampled from the new version
    rollout -> read       of each step, by its record, that trained on the rollout's group: the claim itself, which
                          waits for the group, began before

Servers' clocks may differ by more than the time between two spans. An arrow that would go back in time is left out and
counted: `backwards` says by how much the clocks differ at the least.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mgrpo.errors import CorruptionError
from mgrpo.record.reader import Recording
from mgrpo.record.spans import Span

WEIGHTS_LANE = "weights "
TRAINER = "trainer "


@dataclass(slots=True)
class Arrows:
    """leaving and arriving: id() of a span -> numbers of its arrows; each number is once in both. The spans have to be
    kept as long as this is."""

    leaving: dict[int, list[int]] = field(default_factory=dict)
    arriving: dict[int, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # "publish -> update" ...
    backwards: int = 0
    most_ns: int = 0  # how far the worst of those goes back

    def add(self, first: Span, then: Span) -> None:
        if then.start < first.start:
            self.backwards += 1
            self.most_ns = max(self.most_ns, first.start - then.start)
            return
        number = sum(self.counts.values()) + 1
        name = f"{first.kind} -> {then.kind}"
        self.counts[name] = self.counts.get(name, 0) + 1
        self.leaving.setdefault(id(first), []).append(number)
        self.arriving.setdefault(id(then), []).append(number)


def find_arrows(
    processes: Mapping[str, Sequence[Span]],
    recording: Recording | None = None,
    policies: Mapping[str, str] | None = None,
) -> Arrows:
    """processes: process -> its spans, by start, none of which ends before it starts. recording: of the same run; None:
    no arrows from rollouts. policies: role -> role of the policy it acts with, where that is another's."""
    arrows = Arrows()
    _weights(processes, policies or {}, arrows)
    if recording is not None:
        _training(processes, recording, policies or {}, arrows)
    return arrows


def loads(processes: Mapping[str, Sequence[Span]]) -> Iterator[tuple[str, Span, str, Span]]:
    """(trainer, publication, worker, load) of each load of a version whose publication is known, by its label. A
    trainer that was started again may have published a label twice: the last before the load counts."""
    published: dict[object, list[tuple[str, Span]]] = {}
    for process, spans in processes.items():
        for span in spans:
            if span.kind == "publish" and "label" in span.args:
                published.setdefault(span.args["label"], []).append((process, span))
    for sources in published.values():
        sources.sort(key=lambda source: source[1].start)
    for process, spans in processes.items():
        for span in spans:
            if span.kind == "update" and (found := published.get(span.args.get("label"))):
                at = bisect_right(found, span.start, key=lambda source: source[1].start)
                yield *found[max(0, at - 1)], process, span


def _weights(processes: Mapping[str, Sequence[Span]], policies: Mapping[str, str], arrows: Arrows) -> None:
    for _, publication, _, load in loads(processes):
        arrows.add(publication, load)
    for spans in processes.values():
        updates: dict[tuple[object, object], Span] = {}  # (role, version), until the turn it leads to
        for span in spans:
            if span.kind == "update":
                updates[span.lane.removeprefix(WEIGHTS_LANE), span.args.get("version")] = span
            elif span.kind == "turn":
                role = str(span.args.get("role"))
                key = policies.get(role, role), span.args.get("version")
                update = updates.get(key)
                if update is not None and span.end >= update.end:
                    arrows.add(updates.pop(key), span)


def _training(
    processes: Mapping[str, Sequence[Span]],
    recording: Recording,
    policies: Mapping[str, str],
    arrows: Arrows,
) -> None:
    rollouts: dict[str, list[Span]] = {}
    for span in _of(processes, "rollout"):
        rollouts.setdefault(span.lane, []).append(span)
    reads = {
        (process, span.args.get("step")): span  # the last one of a step that was taken again
        for process, spans in processes.items()
        for span in spans
        if span.kind == "read"
    }
    for (role, step), recorded in list(recording.steps.items()):
        read = reads.get((TRAINER + policies.get(role, role), step))
        if read is None:
            continue
        try:
            body = recorded.body()
        except CorruptionError:  # the record's notes name it
            continue
        for rollout in (f"{query}/{i}" for query in body.queries for i in range(body.k)):
            played = rollouts.get(rollout)
            if played:  # one whose worker was killed has been played again
                arrows.add(_latest(played, read.start), read)


def _latest(spans: Sequence[Span], before: int) -> Span:
    """Of spans by start, the last that had begun; the first where none had."""
    return spans[max(0, bisect_right(spans, before, key=lambda span: span.start) - 1)]


def _of(processes: Mapping[str, Sequence[Span]], kind: str) -> list[Span]:
    return sorted((s for spans in processes.values() for s in spans if s.kind == kind), key=lambda s: s.start)
