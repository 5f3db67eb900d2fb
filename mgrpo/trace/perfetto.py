"""Spans as a Perfetto trace (its native protobuf), which ui.perfetto.dev and Perfetto's trace processor open.

    process of the run      a process of the trace
    track (layout.py)       a track below it, named, in the order of the layout
    span                    a slice: name, category = kind, arguments = args
    arrow (arrows.py)       a flow with a number of its own from slice to slice

Every track is a packet sequence with interned strings of its own, whose events are in order. Times are those of the
trace's own clock, which starts a second before the first span; a clock snapshot ties it to Unix time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from mgrpo.errors import ConfigError
from mgrpo.record.spans import Span
from mgrpo.trace.arrows import Arrows
from mgrpo.trace.layout import ROLLOUT_KINDS, Track, tracks

MISSING = 'a Perfetto trace is written with a package of its own: pip install "mgrpo[trace]"'
LEAD_NS = 1_000_000_000  # the trace's clock at the first span: 0 would be no time to some tools
_CHUNK = 4096  # packets between two writes
_INTERNED = 1000  # names of a track beyond these are written out: they do not repeat
_CLEARED, _NEEDED = 1, 2  # TracePacket.SequenceFlags
_REALTIME, _BOOTTIME = 1, 6  # BuiltinClock


def protocol() -> Any:
    """Perfetto's protobuf module. Raises ConfigError where the package is missing."""
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
    except ImportError:
        raise ConfigError(MISSING) from None
    return perfetto_trace_pb2


def write_trace(
    file: IO[bytes],
    processes: Mapping[str, Sequence[Span]],
    arrows: Arrows,
    written: Callable[[int], None] = lambda spans: None,
) -> None:
    """Write the spans of all processes (process -> its spans, none of which ends before it starts) as one trace. Of the
    arrows those between the same objects are drawn. written: is called with the number of spans that were added since
    the last time. Raises ConfigError without the package, OSError."""
    stream = _Stream(protocol(), file)
    start = min((span.start for spans in processes.values() for span in spans), default=0) - LEAD_NS
    stream.head(start)
    # All descriptors come first: whoever reads the file as a stream has to know a track at its first event.
    drawn: list[tuple[int, Track]] = []
    uuid = 0
    for number, (process, spans) in enumerate(processes.items()):
        uuid += 1
        parent = lane = uuid
        stream.process(uuid, number, process)
        for place, track in enumerate(tracks(spans)):
            uuid += 1
            # What ran beside a lane is drawn below it.
            stream.track(uuid, lane if track.depth else parent, place, track.name)
            if not track.depth:
                lane = uuid
            drawn.append((uuid, track))
    for number, track in drawn:
        _Sequence(stream, number, arrows).write(track, start)
        written(len(track.spans))
    stream.flush()


def events(spans: Sequence[Span]) -> Iterator[tuple[bool, int, Span]]:
    """(whether it begins, how many spans are open around it, span) of a track in the order in which it happens; each
    span begins and ends once, and ends before those around it."""
    open_: list[Span] = []
    for span in spans:
        while open_ and open_[-1].end <= span.start:
            ended = open_.pop()
            yield False, len(open_), ended
        yield True, len(open_), span
        open_.append(span)
    while open_:
        ended = open_.pop()
        yield False, len(open_), ended


class _Stream:
    """Packets on their way into a file. Messages of type Trace one after the other are one message."""

    def __init__(self, protocol: Any, file: IO[bytes]) -> None:
        self._pb, self._file = protocol, file
        self._trace = protocol.Trace()
        self._n = 0

    def packet(self) -> Any:
        if self._n == _CHUNK:
            self.flush()
        self._n += 1
        return self._trace.packet.add()

    def flush(self) -> None:
        self._file.write(self._trace.SerializeToString())
        self._trace, self._n = self._pb.Trace(), 0

    def head(self, start: int) -> None:
        """start: Unix ns where the trace's clock is 0."""
        packet = self.packet()
        packet.trusted_packet_sequence_id = 1
        packet.timestamp = LEAD_NS
        packet.clock_snapshot.primary_trace_clock = _BOOTTIME
        for clock, at in ((_BOOTTIME, LEAD_NS), (_REALTIME, start + LEAD_NS)):
            packet.clock_snapshot.clocks.add(clock_id=clock, timestamp=at)

    def process(self, uuid: int, number: int, name: str) -> None:
        descriptor = self._descriptor(uuid, number)
        descriptor.process.pid = number + 1  # of the trace: those of several servers may be the same
        descriptor.process.process_name = name
        descriptor.child_ordering = descriptor.EXPLICIT

    def track(self, uuid: int, parent: int, place: int, name: str) -> None:
        descriptor = self._descriptor(uuid, place)
        descriptor.parent_uuid = parent
        descriptor.name = name
        descriptor.child_ordering = descriptor.EXPLICIT
        descriptor.sibling_merge_behavior = descriptor.SIBLING_MERGE_BEHAVIOR_NONE

    def _descriptor(self, uuid: int, place: int) -> Any:
        packet = self.packet()
        packet.trusted_packet_sequence_id = 1
        packet.timestamp = LEAD_NS
        packet.track_descriptor.uuid = uuid
        packet.track_descriptor.sibling_order_rank = place
        return packet.track_descriptor


class _Sequence:
    """The packets of one track."""

    def __init__(self, stream: _Stream, uuid: int, arrows: Arrows) -> None:
        self._stream, self._uuid, self._arrows = stream, uuid, arrows
        self._kinds: dict[str, int] = {}
        self._names: dict[str, int] = {}
        self._args: dict[str, int] = {}

    def write(self, track: Track, start: int) -> None:
        """start: Unix ns where the trace's clock is 0."""
        first = True
        for begins, depth, span in events(track.spans):
            packet = self._stream.packet()
            packet.trusted_packet_sequence_id = self._uuid + 1  # 1 is that of the descriptors
            packet.sequence_flags = _CLEARED | _NEEDED if first else _NEEDED
            if first:
                packet.trace_packet_defaults.track_event_defaults.track_uuid = self._uuid
                first = False
            packet.timestamp = (span.start if begins else span.end) - start
            if begins:
                self._begin(packet, span, depth)
            else:
                packet.track_event.type = packet.track_event.TYPE_SLICE_END

    def _begin(self, packet: Any, span: Span, depth: int) -> None:
        event = packet.track_event
        event.type = event.TYPE_SLICE_BEGIN
        event.category_iids.append(self._iid(packet, "event_categories", self._kinds, span.kind))
        if span.name in self._names or (span.kind != "rollout" and len(self._names) < _INTERNED):
            event.name_iid = self._iid(packet, "event_names", self._names, span.name)
        else:
            event.name = span.name
        if depth == 0 and span.kind in ROLLOUT_KINDS:
            self._annotate(packet, "rollout", span.lane)
        for name, value in span.args.items():
            self._annotate(packet, name, value)
        if leaving := self._arrows.leaving.get(id(span)):
            event.flow_ids.extend(leaving)
        if arriving := self._arrows.arriving.get(id(span)):
            event.terminating_flow_ids.extend(arriving)

    def _annotate(self, packet: Any, name: str, value: object) -> None:
        annotation = packet.track_event.debug_annotations.add()
        annotation.name_iid = self._iid(packet, "debug_annotation_names", self._args, name)
        if isinstance(value, bool):
            annotation.bool_value = value
        elif isinstance(value, int) and -(2**63) <= value < 2**63:
            annotation.int_value = value
        elif isinstance(value, float):
            annotation.double_value = value
        else:
            annotation.string_value = str(value)

    @staticmethod
    def _iid(packet: Any, field: str, known: dict[str, int], name: str) -> int:
        """The number of a string in this sequence, which comes with the first packet that uses it."""
        number = known.get(name)
        if number is None:
            number = known[name] = len(known) + 1
            getattr(packet.interned_data, field).add(iid=number, name=name)
        return number
