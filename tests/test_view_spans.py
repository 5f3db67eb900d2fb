"""The timeline from spans: its window, its lines, what is left out of it, and how it looks in a real browser."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mgrpo.errors import ConfigError
from mgrpo.record.reader import Recording
from mgrpo.record.span_reader import SpanReader
from mgrpo.record.spans import Args, Span
from mgrpo.view import span_timeline
from mgrpo.view.data import RunView
from mgrpo.view.server import export
from mgrpo.view.span_timeline import SpanTimeline, picture, window
from mgrpo.view.timeline import timeline
from mgrpo.view.top import RunStatus, render
from tests.browser import MISSING, browser
from tests.fake_spans import ORIGIN, SECOND, add_run_of_spans, trainer_spans, worker_spans, write_spans
from tests.test_view import no_overflow, served

needs_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
HOSTILE = "\u202e<img src=x onerror='window.hacked=1'>"  # a name of a tool
SPEEDS = {"mfu": 0.314, "mfu_wall": 0.2, "tok_per_s": 12345.0, "tok_per_s_wall": 800.0, "peak_mem_gb": 1.25}


def nothing_is_recorded(_: str) -> bool:
    return False


def drawn(spans: dict[str, Sequence[Span]], start: int = ORIGIN) -> dict[str, Any]:
    end = max(span.end for own in spans.values() for span in own)
    return picture(spans, ORIGIN, start, end, nothing_is_recorded)


def bars_of(found: dict[str, Any], size: str) -> list[list[Any]]:
    """[part, start, length, words, row, rollout, is slow] of every bar in rows of a size."""
    return [b for p in found["processes"] for row in p["rows"] if row["size"] == size for b in row["bars"]]


def metrics_of(steps: int, seconds: float) -> list[dict[str, Any]]:
    each = seconds / steps
    return [{"step": n + 1, "time": each * (n + 1), "main/time/step": each} for n in range(steps)]


@pytest.fixture(scope="module")
def spanned(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded run as if its 192 rollouts had taken a minute on one worker, and with figures of its speed."""
    run = tmp_path_factory.mktemp("spans") / "run"
    shutil.copytree(recorded, run, ignore=shutil.ignore_patterns("spans"))
    ids = [r.head.id for r in Recording([run]).rollouts.values() if r.head.split == "train"]
    add_run_of_spans(run, ["main", "left", "right"], ids, evil=HOSTILE)
    with (run / "metrics.jsonl").open("a") as file:
        figures = {f"left/perf/{name}": value for name, value in SPEEDS.items()}
        file.write(json.dumps({"step": 12, "time": 99.0, **figures}) + "\n")
    return run


@pytest.mark.parametrize(("metrics", "begins"), [(True, 28), (False, 29)])
def test_the_window_is_that_of_the_last_steps(tmp_path: Path, metrics: bool, begins: int) -> None:
    """Of 40 steps of 60 s the last 12, though the metrics know of 38 only; without any, those of the last ten minutes;
    rollouts that reach into it from before are among them, those that ended before it are not."""
    write_spans(tmp_path, "trainer main", trainer_spans("main", 40, 2400))
    write_spans(tmp_path, "rollout-0", worker_spans(1, [f"0/0/{i}" for i in range(400)], 8, 2390))
    steps = timeline(metrics_of(38, 2280), ["main"]) if metrics else None
    found = window(SpanReader([tmp_path]), steps)
    assert found is not None
    spans, first, start, end = found
    assert (first, start) == (ORIGIN, ORIGIN + begins * 60 * SECOND) and end >= ORIGIN + 2400 * SECOND
    rollouts = [s for s in spans["rollout-0"] if s.kind == "rollout"]
    assert all(s.end >= start for s in rollouts) and any(s.start < start for s in rollouts)
    assert len(rollouts) < 400
    write_spans(tmp_path, "rollout-1", [Span("turn", "main", "0/1/1", ORIGIN, ORIGIN + 5, {})])
    shown = SpanTimeline(tmp_path).read(steps, nothing_is_recorded)
    assert shown is not None and "nothing of these steps: rollout-1 (" in shown["words"][-1]


def test_every_rollout_of_the_window_is_drawn_where_it_was() -> None:
    """A line holds one rollout at a time; places that are used again save lines; each bar has its span's length."""
    spans = worker_spans(3, [f"0/0/{i}" for i in range(60)], 6, 30.0)
    found = drawn({"rollout-0": spans})
    lines = [row for row in found["processes"][0]["rows"] if row["size"] == "line"]
    assert len(lines) == 6 and found["words"] == []
    rollouts = 0
    for line in lines:
        own = sorted(b for b in line["bars"] if b[0] in ("played", "failed"))
        own.sort(key=lambda b: b[1])
        rollouts += len(own)
        assert all(a[1] + a[2] <= b[1] for a, b in itertools.pairwise(own))
    lengths = sorted((s.end - s.start) // 1000 for s in spans if s.kind == "rollout")
    assert rollouts == 60
    assert sorted(b[2] for b in bars_of(found, "line") if b[0] in ("played", "failed")) == lengths
    assert sum(b[0] in ("turn", "sub_turn") for b in bars_of(found, "line")) == sum(
        s.kind == "turn" for s in spans
    )
    slow = sorted(b[2] for b in bars_of(found, "line") if b[6])
    assert slow == lengths[-10:] and found["slowest"]["rollouts"][0]["seconds"] == pytest.approx(
        lengths[-1] / 1e6
    )


def test_a_rollout_under_way_is_there_as_far_as_its_turns_are_known() -> None:
    """Turns without a rollout's span get an open one; those of the same rollout's earlier attempt keep theirs."""
    turns = [
        Span("turn", "main", "0/0/1", ORIGIN + n * SECOND, ORIGIN + n * SECOND + 5, {}) for n in range(4)
    ]
    whole = Span("rollout", "0/0/1", "0/0/1", ORIGIN, ORIGIN + SECOND + 9, {"status": "failed"})
    parts = [(b[0], b[1]) for b in bars_of(drawn({"rollout-0": [whole, *turns]}), "line") if b[0] != "turn"]
    assert sorted(parts) == [("failed", 0), ("open", 2 * SECOND // 1000)]


def test_what_is_too_much_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines with the longest rollouts stay, the shortest turns go first; trainers and tails are always there."""
    spans: dict[str, Sequence[Span]] = {
        "rollout-0": worker_spans(5, [f"0/0/{i}" for i in range(600)], 200, 60.0),
        "trainer main": trainer_spans("main", 12, 60),
    }
    longest = max(s.end - s.start for s in spans["rollout-0"] if s.kind == "rollout") // 1000
    monkeypatch.setattr(span_timeline, "BARS", 700)
    found = drawn(spans)
    lines = [row for p in found["processes"] for row in p["rows"] if row["size"] == "line"]
    assert len(lines) == span_timeline.WORKER_LINES
    assert "rollout-0: 80 lines of rollouts are not drawn" in found["words"][0]
    assert "turns" in found["words"][1] and "others" not in found["words"][1]
    assert sum(len(row["bars"]) for p in found["processes"] for row in p["rows"]) == 700
    assert longest in {b[2] for b in bars_of(found, "line")}
    assert sum(b[0] == "train" for b in bars_of(found, "main")) == 12


def test_what_is_sent_is_bounded_whatever_names_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of tools that are long, and of signs that JSON writes in six characters."""
    name = "\x01" * 5000
    spans = worker_spans(5, [f"{i}/0/0" for i in range(2000)], 100, 60.0, turns=8, name=name)
    found = drawn({f"rollout-{n}": spans for n in range(3)})
    assert 300_000 < len(json.dumps(found)) < 1_000_000
    assert "not drawn" in found["words"][-1]


def test_weights_are_followed_from_their_publication_to_every_load(spanned: Path) -> None:
    """Three trainers' versions of the window, on one worker; an arrow never begins at another role's trainer."""
    arrows = RunView(spanned).timeline()["timeline"]["arrows"]
    assert len(arrows) == 3 * 12
    assert all(a[0] == f"trainer {a[4].split(',')[0]}" and a[2] == "rollout-0" for a in arrows)
    assert all(a[1] <= a[3] for a in arrows)


def test_a_shared_policys_version_leads_to_every_role_that_acts_with_it() -> None:
    """The sub-agent's engine holds what the main agent's trainer has published."""
    args: Args = {"version": 1, "label": "main.e1.v1"}
    publish = [Span("publish", "main", "main", 1000, 9000, args)]
    update = [Span("update", role, f"weights {role}", 10**6, 2 * 10**6, args) for role in ("main", "sub")]
    arrows = drawn({"trainer main": publish, "rollout-0": update}, start=0)["arrows"]
    assert [(a[0], a[4]) for a in arrows] == [
        ("trainer main", "main, version 1"),
        ("trainer main", "sub, version 1"),
    ]


def test_a_load_before_its_publication_has_no_arrow() -> None:
    """Of servers whose clocks differ; one that begins while the publication lasts has one of no length."""
    publish = [
        Span("publish", "publish", "main", at, at + 9000, {"label": f"v{at}"}) for at in (10**6, 10**7)
    ]
    update = [
        Span("update", "main", "weights main", at, at + 9000, {"label": f"v{label}", "version": "x" * 500})
        for at, label in ((10**6 + 3000, 10**6), (10**7 - 1000, 10**7))
    ]
    found = drawn({"trainer main": publish, "rollout-0": update}, start=0)
    assert [(a[0], a[1], a[2], a[3]) for a in found["arrows"]] == [("trainer main", 1003, "rollout-0", 1003)]
    assert len(found["arrows"][0][4]) < 100
    assert found["words"] == ["1 arrows would go back in time and are not drawn: the servers' clocks differ"]


def test_without_spans_the_metrics_are_drawn(spanned: Path, tmp_path: Path) -> None:
    """record.spans was off, or the run is older; a damaged file of spans is named and ends nothing."""
    run = tmp_path / "run"
    shutil.copytree(spanned, run, ignore=shutil.ignore_patterns("spans"))
    old = RunView(run).timeline()
    assert old["timeline"]["kind"] == "metrics" and set(old["shares"]) == {"main", "left", "right"}
    assert all(sum(parts.values()) == pytest.approx(1.0) for parts in old["shares"].values())
    shutil.copytree(spanned, run, dirs_exist_ok=True)
    for path in run.glob("rollouts/0/spans/*.rec"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    (run / "rollouts/0/spans/notes.txt").write_text("recording stopped at step 3: No space left on device\n")
    assert any("spans: recording stopped" in note for note in RunView(run).overview()["notes"])
    view = RunView(run)
    new, notes = view.timeline(), view.overview()["notes"]
    assert new["timeline"]["kind"] == "spans"
    assert any("spans: recording stopped" in n for n in notes) and any("000001.rec: " in n for n in notes)
    file = tmp_path / "run.html"
    export(run, file, trees=1)
    assert "000001.rec: " in file.read_text()
    os.mkfifo(tmp_path / "pipe")  # as a device: the page must not take its name
    with pytest.raises(ConfigError, match="is there already and is no file"):
        export(run, tmp_path / "pipe")
    assert SpanTimeline(run).read(None, nothing_is_recorded) is not None


def test_top_has_speeds_only_where_they_are_known(spanned: Path, recorded: Path) -> None:
    """Columns appear with the first report of them; a trainer that reports none has a dash."""
    config = RunView(spanned).config
    for known in (True, False):
        status = RunStatus(config)
        status.take(3, {"main/perf/idle": 0.5} | ({"left/perf/mfu": 0.314} if known else {}))
        console = Console(width=200)
        with console.capture() as captured:
            console.print(render(status))
        text = captured.get()
        head, left = (
            next(line.split() for line in text.splitlines() if line.startswith(n)) for n in ("agent", "left")
        )
        assert ("mfu" in head) is known and "tok/s" not in head
        if known:
            assert left[head.index("mfu")] == "31.4%"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_the_timeline_in_a_browser(spanned: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Rollouts, turns, tools and all parts of the steps are drawn and named; the lists and bars lead to trees; a
    hostile name of a tool stays text."""
    file = tmp_path / "run.html"
    export(spanned, file, trees=4)
    with browser(tmp_path, width=width, dark=dark) as page:
        page.open(file.as_uri())
        page.until("return document.querySelector('[data-timeline=spans]') !== null")
        parts = page.run("return [...document.querySelectorAll('[data-part]')].map(e => e.dataset.part)")
        assert [parts.count(p) for p in ("step", "train", "publish", "report")] == [36] * 4
        assert parts.count("stage") == 2 * 36
        assert parts.count("played") > 50 and parts.count("tool") > 50 and parts.count("update") >= 36
        assert page.run("return document.querySelectorAll('[data-flow]').length") == 36
        titles = page.run(
            "return [...document.querySelectorAll('[data-part=tool] title')].map(e => e.textContent)"
        )
        assert all("<img src=x" in t and "[U+202E]" in t and t.endswith(" s") for t in titles)
        lists = page.run(
            "return [...document.querySelectorAll('[data-slowest]')].map(e => e.dataset.slowest)"
        )
        assert lists == ["rollouts", "turns", "tool calls"]
        facts = page.run("return [...document.querySelectorAll('[data-fact]')].map(e => e.textContent)")
        assert "31.4 % (20.0 % of wall time)" in facts and "12,345 (800 of wall time)" in facts
        assert page.run("return document.querySelectorAll('[data-share=train]').length") == 3
        assert no_overflow(page)
        first = page.run("return document.querySelector('[data-slowest=rollouts] a').textContent")
        page.click("[data-slowest=rollouts] a")
        page.until("return document.querySelector('[data-rollout]')?.dataset.rollout === arguments[0]", first)
        assert page.run("return window.hacked") is None and page.problems() == []


@needs_browser
def test_a_rollout_that_ends_while_the_page_is_open_appears(spanned: Path, tmp_path: Path) -> None:
    """The picture follows a run between two steps, when no metric has come."""
    run = tmp_path / "run"
    shutil.copytree(spanned, run)
    with served(run) as (url, _), browser(tmp_path) as page:
        page.open(url)
        page.until("return document.querySelector('[data-timeline=spans]') !== null")
        late = Span("rollout", "late", "late", ORIGIN + 60 * SECOND, ORIGIN + 70 * SECOND, {"status": "ok"})
        write_spans(run, "rollout-7", [late])
        titles = "[...document.querySelectorAll('[data-part=played] title')]"
        page.until(f"return {titles}.some(e => e.textContent.includes('late'))", seconds=60)
        assert page.problems() == []
