"""The page of a research run: tool calls at their turn, failures by kind, services, secret questions, named sets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from mgrpo.config.record import RecordConfig
from mgrpo.record.reader import Recording
from mgrpo.record.rollouts import Asked, RolloutRecorder
from mgrpo.record.schema import RolloutHead
from mgrpo.tools import calls
from mgrpo.view.data import RunView
from mgrpo.view.server import export
from mgrpo.view.top import RunStatus, Watcher, render
from tests.browser import MISSING, Browser, browser
from tests.research_kit import FIJI, PLAIN, KitTask, by_task, lines, roll, said
from tests.research_record import CALLS, DIGEST, STEP, add_metrics, add_research, add_secret, call
from tests.runs import records
from tests.test_view import EVIL, no_overflow

needs_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
FATAL = "service 'search' at http://127.0.0.1:9 refused the key <b>(401)</b>"
LONG = EVIL + "y" * 1500 + "END"
SHOWN = LONG.replace("\x1b", "␛").replace("\u202e", "[U+202E]")
HOSTILE = call("left", 0, 1, EVIL, arguments=LONG, source=EVIL, status="tool_error", digest=EVIL)


@pytest.fixture(scope="module")
def research(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recorded run with a research task's rollouts and metrics."""
    run = tmp_path_factory.mktemp("research") / "run"
    shutil.copytree(recorded, run)
    add_research(run, [*CALLS, HOSTILE], EVIL)
    add_secret(run)
    add_metrics(run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"outcome": "failed", "reason": FATAL}))
    return run


def test_the_kind_of_every_failure_is_recorded(recorded: Path) -> None:
    """A whole run whose tool fails one rollout of each group: as many of the kind as the workers have counted, and no
    other rollout has one."""
    rollouts = [r.head for r in Recording([recorded]).rollouts.values() if r.head.split == "train"]
    failed = [head for head in rollouts if head.status == "failed"]
    counted = sum(r.get("rollout/failed_by_infrastructure", 0) for r in records(recorded))
    assert {head.failed_by for head in failed} == {"infrastructure"} and len(failed) == counted > 0
    assert {head.failed_by for head in rollouts if head.status == "ok"} == {""}


def test_records_of_before_kinds_were_kept_are_read() -> None:
    """An older head has neither field."""
    names = ("id", "query", "split", "mode", "status", "question", "answer", "gold")
    old = {"type": "rollout", "index": 0, "rollout": 0, "step": 0, "correct": 0.0, "d_k": {}, "tokens": {}}
    data = msgspec.msgpack.encode(old | dict.fromkeys(names, "x"))
    head = msgspec.msgpack.decode(data, type=RolloutHead)
    assert (head.failed_by, head.tool_errors, head.redacted) == ("", 0, False)


def test_lists_and_trees_name_failures_and_calls(research: Path) -> None:
    """Columns of the list and fields of the trees, rollout by rollout."""
    view = RunView(research)
    listed = view.overview()["rollouts"]
    place = {name: number for number, name in enumerate(listed["id"])}
    mine = [place[f"{STEP}/0/{k}"] for k in range(7)]
    kinds = ["", "", "infrastructure", "length", "deadline", "task", ""]
    assert [listed["texts"][listed["failed_by"][n]] for n in mine] == kinds
    assert [listed["tool_errors"][n] for n in mine] == [2, 0, 0, 0, 0, 0, 0]
    tree = view.rollout(f"{STEP}/0/0")
    assert tree["tools"] == [*CALLS, HOSTILE] and tree["verdict"]["judge"] == "correct"
    assert (tree["question_id"], tree["tags"]) == ("fiji-1", {"level": "2"})
    late = view.rollout(f"{STEP}/0/4")
    assert late["failed_by"] == "deadline" and late["failure"].startswith("it was deadline x")


def test_counters_of_services_are_summed(research: Path) -> None:
    """What two workers report at one step adds up; any other number is that of the last report."""
    series = RunView(research).overview()["series"]
    assert [p[:2] for p in series["service/search/calls"]] == [[1, 20.0], [2, 40.0]]
    assert [p[:2] for p in series["rollout/tool/search/seconds_p95"]] == [[1, 2.0], [2, 4.0]]
    assert [p[:2] for p in series["service/search/waited"]] == [[2, 65.0]]


def text_of(status: RunStatus) -> str:
    console = Console(width=200, highlight=False)
    with console.capture() as captured:
        console.print(render(status))
    return captured.get()


def test_top_shows_services_and_who_waits_for_them(research: Path) -> None:
    """Sums over all reports, each counted once whether it comes from the store, the file or both; and the workers that
    an outage keeps."""
    with Watcher(research) as watcher:
        watcher.refresh()
        watcher.refresh()
        status = watcher.status
    shown = text_of(status)
    assert (
        "service search: 60 calls, 40% recorded answers, 4 retries, 3 failures, 1 outages, 0.50 s a live call, "
        "1:05 waited" in shown
    )
    assert "service judge: 8 calls, 0% recorded answers, 2.50 s a live call" in shown
    assert "failed rollouts in the last report: 4 infrastructure" in shown and "is down" not in shown
    status.take(3, {"service/search/calls": 5.0}, 9999)
    status.take(3, {"service/search/calls": 5.0}, 9999)
    status.paused = ["rollout-0\x1b[31m"]
    shown = text_of(status)
    assert "service search: 65 calls" in shown
    assert "waiting for a service that is down: rollout-0" in shown and "\x1b[31m" not in shown


def opened(page: Browser, file: Path, place: str, wait: str) -> None:
    page.open("about:blank")
    page.open(f"{file.as_uri()}#{place}")
    page.until(f"return document.querySelector({wait!r}) !== null")


TRANSCRIPT = """
const words = (e) => e.matches('.turn') ? e.querySelector('.who').textContent : e.matches('[data-call]') ? 'call'
    : e.matches('.tool') ? `${e.dataset.status} ${e.querySelector('strong').textContent.slice(0, 6)}` : e.textContent;
const parts = '.tree .turn, .tree .tool, .tree [data-call], .tree .late > .quiet';
return [...document.querySelectorAll(parts)].map(words)"""
"""What stands in a tree, from top to bottom."""
ROWS = """
return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.cells].map(c => c.textContent))"""
LEGEND = """
const entries = `[data-chart^='${arguments[0]}'] .legend > span`;
return [...document.querySelectorAll(entries)].map(e => e.textContent)"""


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_tools_services_and_failures_in_a_browser(
    research: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    """Calls stand at the turn that made them, with state, source, seconds and digest; texts of anybody are text; long
    ones are folded; failures are counted and filtered by kind; services, tools and named sets have their numbers."""
    file = tmp_path / "run.html"
    export(research, file)
    with browser(tmp_path, width=width, dark=dark) as page:
        opened(page, file, f"tab=rollouts&id={STEP}/0/0", "[data-rollout]")
        assert page.run(TRANSCRIPT) == [
            *("given", "main", "ok ask", "call", "given", "left", "ok search", "empty search"),
            *("given", "left", "ok visit", f"tool_error {EVIL[:6]}", "turn 10", "ok visit"),
            *("given", "main", "tool_error ask"),
        ]
        first = page.run("return document.querySelector('.call .tool').textContent")
        assert first == f'oksearch {{"query": "Fiji capital"}}cache0 s1,234 chars{DIGEST[:8]}'
        outcome = page.run("return document.querySelector('.tree .outcome').textContent")
        assert outcome == "correctrule gaia: 0judge: correct (cache)abcdef01"
        assert page.run("return document.querySelector('[data-tools]').textContent").startswith("tool calls7")
        more = "[data-status=tool_error] details.more"
        assert page.run("return document.querySelector(arguments[0]).open", more) is False
        assert page.run("return document.querySelector(arguments[0] + ' > summary').textContent", more) == (
            f"{len(SHOWN) - 500:,} more characters"
        )
        whole = (
            "return [...document.querySelectorAll('.call .tool.bad .said')].map(e => e.textContent).join('')"
        )
        assert page.run(whole) == SHOWN
        colours = page.run(
            "return ['ok', 'empty', 'tool_error'].map(s => getComputedStyle(document.querySelector("
            "`.tool[data-status=${s}] .badge`)).color)"
        )
        assert len(set(colours)) == 3
        assert page.run("return [window.hacked, document.querySelectorAll('main img, main b').length]") == [
            None,
            0,
        ]
        assert no_overflow(page)
        check_filters(page)
        check_services(page, file)
        assert page.problems() == []


def check_filters(page: Browser) -> None:
    """The buttons count what the other filters leave; one chosen shows those alone, chosen again all."""
    page.type("[name=from]", str(STEP))
    counts = "return [...document.querySelectorAll('#kinds button')].map(e => e.textContent)"
    kinds = ["tool errors 2", "infrastructure 1", "length 1", "deadline 1", "task 1", "kind not recorded 1"]
    assert page.run(counts) == kinds
    assert (
        page.run("return document.querySelector('#kinds [data-kind=fatal]').textContent") == f"fatal: {FATAL}"
    )
    listed = "return [...document.querySelectorAll('tr[data-id]')].map(e => e.dataset.id)"
    everything = page.run(listed)
    for kind, ids in (("deadline", [4]), ("unknown", [6]), ("tool_error", [0])):
        page.click(f"#kinds [data-kind={kind}]")
        assert page.run(counts) == kinds  # the others can still be chosen
        assert page.run(listed)[: len(ids)] == [f"{STEP}/0/{k}" for k in ids]
    page.click("#kinds [data-kind=tool_error]")
    assert page.run(listed) == everything and len(everything) == 8


def check_services(page: Browser, file: Path) -> None:
    """Totals of the run, the last report of each tool; a chart each, and a legend entry for each named set."""
    opened(page, file, "tab=services", "#tools")
    judge, search = page.run(ROWS, "#services")
    assert search == ["search", "60", "36", "24", "0", "40 %", "4", "3", "1", "65 s", "0.500", "–", "–"]
    assert judge == ["judge", "8", "8", "0", "0", "0 %", "0", "0", "0", "–", "2.500", "1,600", "–"]
    assert page.run(ROWS, "#tools")[0] == ["search", "2", "3", "0", "0.50", "0.250", "4.000", "0.500"]
    assert no_overflow(page)
    assert page.run(LEGEND, "seconds of a tool call")[:2] == ["search, median 0.250", "search, p95 4"]
    assert page.run(LEGEND, "failed requests") == ["search 3"]
    opened(page, file, "tab=curves", "figure")
    assert page.run(LEGEND, "accuracy on the named sets") == ["gaia 0.500", "webwalker 0.700"]
    assert page.run(LEGEND, "gaia by tag") == ["level-1 0.500", "level-2 0.250"]
    assert page.run("return document.querySelectorAll('line.error').length") == 6
    assert page.run(LEGEND, "failed rollouts by kind") == ["infrastructure 4"]
    assert no_overflow(page)


@needs_browser
def test_secret_questions_are_shown_as_redacted(research: Path, tmp_path: Path) -> None:
    """No word of theirs is in the page; where one would stand it says so, and each question keeps a line of its own
    before and after training."""
    secret = f"{STEP}/1/0"
    file = tmp_path / "run.html"
    export(research, file)
    assert re.findall("hidden (?:words|gold)", file.read_text()) == []
    with browser(tmp_path) as page:
        opened(page, file, f"tab=rollouts&id={secret}", "[data-rollout]")
        head = page.run(
            "return [...document.querySelectorAll('.tree > h2, .tree > p')].map(e => e.textContent)"
        )
        assert head[0] == "redacted" and "answer and expected answer redacted" in head[1]
        assert "question secret-7" in head[2] and "no text and no token" in head[3]
        assert page.run("return document.querySelectorAll('.tool').length") == len(CALLS)
        opened(page, file, "tab=compare&kind=gaia, sampled", "tbody tr")
        rows = page.run("return [...document.querySelectorAll('tbody tr')].map(e => e.textContent)")
        assert rows == [f"redacted question {n}wrongcorrect" for n in (0, 1)]
        assert page.problems() == []


def test_calls_of_the_research_task_stand_at_their_turns(recorded: Path, tmp_path: Path) -> None:
    """A rollout that tasks/research has played: the turn that a call names is the agent's stretch of sampled text, from
    0, whose words make that very call."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    both = calls.render("hermes", ("search", {"query": "suva"}), ("visit", {"url": "w/none"}))
    rollout = roll(
        KitTask(roles=("main", "left")),
        main=lines(
            said(ask="first"),
            said(ask="second"),
            said(answer="Nukualofa"),
        ),
        left=by_task({"first": [both, said(visit="w/fiji"), said(report="a")], "second": [said(report="b")]}),
    )
    recorder = RolloutRecorder(RecordConfig(tokens_every=1), run / "rollouts" / "8", print)
    recorder.train(STEP, 3, rollout.query, rollout.rollout, Asked(FIJI.text, FIJI.answer), rollout, "")
    recorder.close()
    tree = RunView(run).rollout(f"{rollout.query}/{rollout.rollout}")
    assert [(c["tool"], c["turn"], c["status"]) for c in tree["tools"]] == [
        *(("ask", 0, "ok"), ("ask", 1, "ok")),
        *(("search", 0, "ok"), ("visit", 0, "tool_error"), ("visit", 1, "ok")),
    ]
    played = {(t.role, t.invocation): t for t in rollout.trajectories()}
    for made in tree["tools"]:
        (shown,) = [
            t
            for t in tree["trajectories"]
            if (t["role"], t["invocation"]) == (made["role"], made["invocation"])
        ]
        turn = [t for t in shown["turns"] if t["sampled"]][made["turn"]]
        ids = played[made["role"], made["invocation"]].tokens[turn["from"] : turn["from"] + turn["tokens"]]
        words = PLAIN.decode(ids.tolist())
        assert f'"{made["tool"]}"' in words and made["arguments"] in words
    listed = RunView(run).overview()["rollouts"]
    assert listed["tool_errors"][listed["id"].index(tree["id"])] == 1
