"""Spans of a process: what is kept, when it is written, and that keeping them never ends anything."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgrpo.config.run import RecordConfig
from mgrpo.errors import DeadlineError
from mgrpo.record import segments, spans
from mgrpo.record.span_reader import SpanReader
from mgrpo.record.spans import Span, SpanLog

SECOND = 1_000_000_000


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test's log is not the next one's."""
    yield
    spans.record_to(None)


def opened(run: Path, **settings: object) -> SpanLog:
    return SpanLog(RecordConfig(**settings), run / "rollouts" / "0", "rollout-0", lambda line: None)  # type: ignore[arg-type]


def tool(start: int, end: int, name: str = "search") -> Span:
    return Span("tool", name, "3/1/0", start, end, {"attempt": 0})


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    """Kind, name, lane, times and args of each span, by start and the longer first, process by process."""
    log = opened(tmp_path)
    spans.record_to(log)
    with spans.span("tool", "search", "3/1/0", {"attempt": 1}) as args:
        spans.add("wait", "inner", "main", start := spans.now(), spans.now(), {"step": 3})
        args["failed"] = 0
    log.close()
    outer, inner = SpanReader([tmp_path]).spans()["rollout-0"]
    assert (outer.kind, outer.name, outer.lane) == ("tool", "search", "3/1/0")
    assert outer.args == {"attempt": 1, "failed": 0} and inner.args == {"step": 3} and inner.start == start
    assert outer.start <= inner.start <= inner.end <= outer.end


def test_a_span_is_kept_where_its_block_raises() -> None:
    """What failed took time too, and the error goes on."""
    kept: list[Span] = []
    log = opened(Path("unused"), enabled=False)
    log.add = kept.append  # type: ignore[method-assign]
    spans.record_to(log)
    with pytest.raises(KeyError), spans.span("tool", "search"):
        raise KeyError("gone")
    assert [s.name for s in kept] == ["search"]


@pytest.mark.parametrize("settings", [{"enabled": False}, {"spans": False}])
def test_what_is_switched_off_leaves_no_folder(tmp_path: Path, settings: dict[str, bool]) -> None:
    """Neither the record as a whole nor spans alone write then, and nobody is said to record."""
    log = opened(tmp_path, **settings)
    spans.record_to(log)
    assert not spans.recording()
    spans.add("tool", "search", "3/1/0", 1, 2)
    log.close()
    assert not list(tmp_path.iterdir())


def test_spans_are_written_about_once_a_second(tmp_path: Path) -> None:
    """A killed process loses what ended in its last second, and no more: a reader of the live run has the rest."""
    log, reader = opened(tmp_path), SpanReader([tmp_path])
    now = spans.now()
    log.add(tool(now, now + SECOND // 2))
    assert reader.refresh() == 0
    log.add(tool(now, now + 3 * SECOND, "visit"))
    assert reader.refresh() == 1 and [s.name for s in reader.spans()["rollout-0"]] == ["visit", "search"]
    assert reader.bounds() == (now, now + 3 * SECOND)
    log.close()
    assert reader.refresh() == 0


def test_a_window_holds_what_touches_it(tmp_path: Path) -> None:
    """A span that began before the window, or ends after it, is in it; one beside it is not."""
    log = opened(tmp_path)
    for start, end in ((10, 20), (15, 40), (35, 60), (50, 70)):
        log.add(tool(start, end))
        log.flush()
    log.close()
    reader = SpanReader([tmp_path])
    assert [s.start for s in reader.spans(30, 45)["rollout-0"]] == [15, 35]
    assert [s.start for s in reader.spans(end=14)["rollout-0"]] == [10]


def test_threads_lose_nothing(tmp_path: Path) -> None:
    """Spans that end on several threads while others are written are all there, each once."""
    log = opened(tmp_path)
    spans.record_to(log)

    def work(number: int) -> None:
        for i in range(2000):
            spans.add("tool", f"{number}/{i}", "3/1/0", i, i + 1)
            if i % 10 == 0:
                log.flush()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    names = [s.name for s in SpanReader([tmp_path]).spans()["rollout-0"]]
    assert len(names) == len(set(names)) == 8000


def test_a_full_disk_ends_the_recording_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No span raises, the reason is reported once, and a report that fails is nobody's error."""
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        raise DeadlineError("the store is gone")

    log = SpanLog(RecordConfig(), tmp_path, "rollout-0", report)
    spans.record_to(log)

    def full(self: object, head: bytes, body: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segments.SegmentWriter, "append", full)
    for _ in range(3):
        with spans.span("tool", "search"):
            pass
        log.flush()
    assert not spans.recording() and len(lines) == 1 and "No space left on device" in lines[0]
    log.close()


def test_a_closed_log_takes_nothing_more(tmp_path: Path) -> None:
    """A thread that ends a span after the process's log was closed neither raises nor writes."""
    log = opened(tmp_path)
    spans.record_to(log)
    spans.add("tool", "search", "3/1/0", 1, 2)
    log.close()
    spans.add("tool", "late", "3/1/0", 1, 2)
    log.close()
    assert [s.name for s in SpanReader([tmp_path]).spans()["rollout-0"]] == ["search"]


def test_a_thread_that_writes_while_the_log_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close() waits for it: no file is opened anew, nothing raises, and what it writes is whole."""
    log, append = opened(tmp_path), segments.SegmentWriter.append
    closing = threading.Thread(target=log.close)

    def slow(self: segments.SegmentWriter, head: bytes, body: bytes) -> None:
        closing.start()
        closing.join(0.2)  # it has come as far as it comes
        append(self, head, body)
        append(self, head, body)

    monkeypatch.setattr(segments.SegmentWriter, "append", slow)
    log.add(tool(1, 2))
    log.flush()
    closing.join()
    assert not log.active and len(list(tmp_path.glob("**/*.rec"))) == 1
    assert len(SpanReader([tmp_path]).spans()["rollout-0"]) == 2


def test_what_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    """A task's tool may have any name; the spans beside it are kept, and whoever writes them next is not to blame."""
    log = opened(tmp_path)
    for name in ("search", "\ud800", object()):
        log.add(tool(1, 2, name))  # type: ignore[arg-type]
    log.add(Span("tool", "far", "3/1/0", 1, 1 << 70))
    log.flush()
    log.add(tool(1, 2, "\ud800"))
    log.close()
    (kept,) = SpanReader([tmp_path]).spans().values()
    assert [s.name for s in kept] == ["search"]


def test_only_the_log_that_ends_is_left(tmp_path: Path) -> None:
    """Of two feeds in one process the one that ends first leaves the other's log alone."""
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    spans.record_to(first)
    spans.record_to(second)
    spans.stop_recording(first)
    assert spans.recording()
    spans.stop_recording(second)
    assert not spans.recording()
    first.close()
    second.close()


def test_what_is_torn_is_passed_over(tmp_path: Path) -> None:
    """A killed process leaves half a frame; its successor's spans are read all the same. A frame that is damaged in the
    middle is named."""
    for number in range(2):
        log = opened(tmp_path)
        for i in range(2):
            log.add(tool(10 * number + i, 10 * number + i + 1, f"{number}/{i}"))
            log.flush()
        log.close()
    first, second = sorted((tmp_path / "rollouts" / "0" / "spans").glob("*.rec"))
    first.write_bytes(first.read_bytes()[:-5])
    reader = SpanReader([tmp_path])
    assert [s.name for s in reader.spans()["rollout-0"]] == ["0/0", "1/0", "1/1"] and not reader.damaged
    data = bytearray(second.read_bytes())
    data[-3] ^= 1  # of the last body
    second.write_bytes(data)
    reader = SpanReader([tmp_path])
    assert [s.name for s in reader.spans()["rollout-0"]] == ["0/0", "1/0"]
    assert "checksum" in reader.damaged[second]


def test_spans_are_bounded(tmp_path: Path) -> None:
    """record.max_mb bounds them: the oldest go, but for those of the start."""
    log = opened(tmp_path, max_mb=0.1)
    for i in range(600):
        log.add(tool(i, i + 1, "x" * 500))
        log.flush()
    log.close()
    assert sum(p.stat().st_size for p in tmp_path.glob("**/*.rec")) <= 1e5
    starts = [s.start for s in SpanReader([tmp_path]).spans()["rollout-0"]]
    assert starts[0] == 0 and starts[-1] == 599 and len(starts) < 300


def test_the_clock_is_that_of_the_wall() -> None:
    """Times are Unix nanoseconds, and never go back."""
    import time

    marks = [spans.now() for _ in range(1000)]
    assert marks == sorted(marks) and abs(marks[0] - time.time_ns()) < 60 * SECOND
