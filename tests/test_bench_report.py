"""`make bench` and `make bench-quick` with benches that miss, crash and hang, and the page that shows their figures."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import quick, report
from bench.common import Comparison, Report, Timing, parser
from bench.quick import Bound, Check
from bench.report_bars import pictures, svg
from bench.report_page import Heading, page
from bench.running import Job, Outcome, outcome_of, run

ROOT = Path(__file__).parent.parent
HOSTILE = "</table><script>alert('a&b')</script>\""
HEADING = Heading("2026-01-02 03:04 UTC", "abc1234", {"cpu": f"2 x {HOSTILE}"}, "quick", 12.0)
FAKE = """
import json, pathlib, sys, time
count = pathlib.Path(sys.argv[1])
number = int(count.read_text()) if count.exists() else 0
count.write_text(str(number + 1))
value = json.loads(sys.argv[2])[number]
if value == "crash":
    raise SystemExit("the bench is broken")
if value == "hang":
    print("hanging", flush=True)
    time.sleep(600)
figures = [] if value is None else [{"item": "rival / ours", "value": value, "unit": "x", "verdict": ""}]
print("missing rival: that one")
pathlib.Path(sys.argv[4]).write_text(json.dumps({"figures": figures}))
"""


def fake(folder: Path, *values: object, deadline_s: float = 60.0) -> Check:
    """A bench whose figure is the next of `values` at each run; its bound is 2."""
    script = folder / "fake.py"
    script.write_text(FAKE)
    command = (sys.executable, str(script), str(folder / "count"), json.dumps(values))
    return Check(Job("fake", command, deadline_s), (Bound("rival / ours", at_least=2.0),))


def guarded(folder: Path, check: Check, limit_s: float = 300.0) -> tuple[quick.Row, int, int]:
    """(the only row, exit status, how often the bench ran)."""
    rows = quick.guard([check], limit_s, lambda job: run(job, folder / "out"))
    assert len(rows) == 1
    count = folder / "count"
    return rows[0], quick.summary(rows, 1.0, folder / "out"), int(count.read_text()) if count.exists() else 0


@pytest.mark.parametrize(
    ("values", "verdict", "status", "runs"),
    [
        ([2.5], "pass", 0, 1),
        ([1.5, 2.5], "missed once", 0, 2),
        ([1.5, 1.4], "MISSED TWICE", 1, 2),
        (["crash", 2.5], "pass", 0, 2),
        (["crash", 1.5], "missed once", 0, 2),
        (["crash", "crash"], "CRASHED TWICE", 1, 2),
        ([1.5, "crash"], "missed once", 0, 2),
        ([None], "not run", 0, 1),
    ],
)
def test_only_what_fails_twice_in_a_row_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: list[object],
    verdict: str,
    status: int,
    runs: int,
) -> None:
    """A flaky bench, a steadily bad one, a crashing one and one without its rival."""
    row, found, ran = guarded(tmp_path, fake(tmp_path, *values))
    assert (row.verdict, found, ran) == (verdict, status, runs)
    written = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [r["verdict"] for r in written] == [verdict]
    printed = capsys.readouterr()
    if verdict == "MISSED TWICE":
        assert "fake: rival / ours: 1.5 and 1.4, bound >= 2" in printed.err
    if verdict == "CRASHED TWICE":
        assert "exit status 1" in printed.err and "the bench is broken" in printed.out
    if verdict == "not run":
        assert "missing rival: that one" in row.why


def test_a_hanging_bench_is_stopped_and_is_no_failure(tmp_path: Path) -> None:
    """Its deadline ends it; a machine may be as slow as that, so it is reported alone."""
    row, status, runs = guarded(tmp_path, fake(tmp_path, "hang", deadline_s=2.0))
    assert (row.verdict, status, runs) == ("not run", 0, 1)
    assert "deadline of 2 s" in row.why


def test_what_the_machine_has_no_room_for_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bench that the system kills, a folder that cannot be made, and a full disk, before the bench or by it."""
    killed = Job("fake", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"), 60.0)
    assert run(killed, tmp_path).status == "not run"
    (tmp_path / "file").touch()
    outcome = run(fake(tmp_path, 2.5).job, tmp_path / "file" / "folder")
    assert outcome.status == "not run" and "Not a directory" in outcome.reason
    free = [1e9, 1e9, 1e6]
    usage = SimpleNamespace
    monkeypatch.setattr("bench.running.shutil.disk_usage", lambda _: usage(free=free.pop(0) if free else 1e6))
    row, status, runs = guarded(tmp_path, fake(tmp_path, "crash", "crash"))
    assert (row.verdict, status, runs) == ("not run", 0, 1) and "is full: 1 MB are free" in row.why
    row, status, runs = guarded(tmp_path, fake(tmp_path, 2.5))
    assert (row.verdict, status, runs) == ("not run", 0, 1) and "is full" in row.why


def test_a_figure_that_cannot_be_measured_here_is_no_failure() -> None:
    """A peak of memory, where the kernel does not let it be set back."""
    outcome = Outcome("fake", "ok", figures=[{"item": "rival / ours", "value": math.nan}])
    rows = quick.guard([Check(Job("fake", (), 1.0), (Bound("rival / ours", 2.0),))], 60.0, lambda _: outcome)
    assert [row.verdict for row in rows] == ["not run"]


def test_the_whole_step_begins_nothing_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a rival takes minutes, and more memory than a small machine has."""
    memory = SimpleNamespace(available=64e9)
    monkeypatch.setattr("bench.report.psutil.virtual_memory", lambda: memory)
    given = report.arguments_of("bench_train_step", False, 1200.0)
    assert given == ["--micro-batch", "2572", "--limit", "600"]
    memory.available = 8e9
    given = report.arguments_of("bench_train_step", False, 1200.0)
    assert given == ["--model", "quick", "--limit", "600"]
    assert report.arguments_of("bench_train_step", True, 300.0) == ["--quick"]
    assert (
        report.arguments_of("bench_compile", True, 300.0)
        == report.arguments_of("bench_store", False, 1.0)
        == []
    )


def test_what_the_limit_of_the_command_leaves_out_is_named(tmp_path: Path) -> None:
    """No bench begins after it."""
    row, status, runs = guarded(tmp_path, fake(tmp_path, 2.5), limit_s=0.0)
    assert (row.verdict, status, runs) == ("not run", 0, 0)
    assert "0 s are over" in row.why


@pytest.mark.parametrize("own", [False, True], ids=["its group", "a session of its own"])
def test_a_stopped_bench_takes_its_processes_along(tmp_path: Path, own: bool) -> None:
    """A store, a client or a rank that a bench started does not go on after the bench's deadline."""
    mark = tmp_path / "child"
    child = (
        f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session={own})"
    )
    job = Job("parent", (sys.executable, "-c", parent), 3.0)
    outcome = run(job, tmp_path)
    assert outcome.status == "hung"
    if not mark.exists():
        pytest.skip("this machine was too busy to start the child in time")
    assert gone(int(mark.read_text()))


def test_a_terminated_command_takes_its_bench_along(tmp_path: Path) -> None:
    """SIGTERM, as a CI that gives up sends it."""
    mark = tmp_path / "bench"
    code = (
        f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    command = (
        "import sys; from pathlib import Path; from bench.running import Job, run, stop_on_sigterm; stop_on_sigterm()\n"
        f"run(Job('fake', (sys.executable, '-c', {code!r}), 300.0), Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT)
    try:
        for _ in range(600):
            if mark.exists() and mark.read_text():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 128 + 15
    finally:
        process.kill()
        process.wait()
    assert gone(int(mark.read_text()))


def gone(pid: int) -> bool:
    """Has a process ended within ten seconds? It is killed otherwise."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    os.kill(pid, 9)
    return False


def test_bounds_are_inclusive_and_refuse_nan() -> None:
    """A figure that could not be computed is past every bound."""
    bound = Bound("x", 1.0, 2.0)
    assert bound.holds(1.0) and bound.holds(2.0) and not bound.holds(2.001)
    assert not bound.holds(math.nan)
    assert str(bound) == ">= 1 and <= 2"


def test_the_table_names_figures_that_the_benches_have() -> None:
    """A figure with another name would be "not run" for ever. tests/test_bench_train_step.py runs that bench, whose
    baseline has no rival that would have begun after its --limit."""
    limit, checks = quick.read_table(quick.TABLE)
    assert limit > 0 and len(checks) >= 6
    for check in checks:
        assert (ROOT / "bench" / f"{check.job.name}.py").exists()
        baseline = ROOT / "bench" / "baselines" / f"{check.job.name.removeprefix('bench_')}.json"
        if baseline.exists() and check.job.name != report.STEP:
            known = {f["item"] for f in json.loads(baseline.read_text())["figures"]}
            wanted = {b.item.replace("random-120m", "smollm2") for b in check.bounds}
            assert wanted <= known, f"{check.job.name}: {sorted(wanted - known)}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit_s = 1\n[bench_x]\ndeadline_s = 1\nat_last = {a = 1}", "unknown keys"),
        ("limit_s = 1\n[bench_x]\ndeadline_s = 1", "no bound"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Before anything is started."""
    path = tmp_path / "table.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        quick.read_table(path)


def comparison() -> Comparison:
    """Ours takes 2 ms, rivals 6 and 8, the floor 1."""
    times = {"memcpy": Timing((1.0, 1.0)), "ours": Timing((2.0, 2.0))}
    times |= {HOSTILE: Timing((6.0, 6.0)), "slow": Timing((8.0, 8.0))}
    return Comparison.of(times, "ours", HOSTILE, "slow", "not measured", floor="memcpy")


def test_a_comparison_knows_its_best_rival() -> None:
    """Least time is best for times, most for rates; without a rival the floor is what counts."""
    c = comparison()
    assert (c.value, c.best_rival, c.of_floor) == (3.0, HOSTILE, 2.0)
    rates = Comparison(30.0, {"a": 10.0, "b": 20.0}, 60.0, "disk", "/s", more_is_better=True)
    assert (rates.value, rates.best_rival, rates.of_floor) == (1.5, "b", 2.0)
    assert Comparison(3.0, floor=2.0).value == 1.5
    with pytest.raises(ValueError, match="a rival or a floor"):
        _ = Comparison(1.0).value


def written(path: Path) -> Outcome:
    """A report's figures by way of its file."""
    found = Report("bench_fake")
    found.compare(f"rivals / ours {HOSTILE}", comparison(), at_least=4.0, note=HOSTILE)
    found.figure("bytes", 12345.0, "B", at_most=20000.0)
    found.figure("could not be measured", math.nan, "GB")
    assert found.finish(parser("").parse_args(["--json", str(path)])) == 0
    return outcome_of("bench_fake", path)


def test_figures_survive_their_file(tmp_path: Path) -> None:
    """What a bench compared is what the page gets."""
    outcome = written(tmp_path / "fake.json")
    first, second, third = outcome.figures
    assert outcome.status == "ok" and outcome.machine["cpu"]
    assert first["compared"] == comparison().as_dict()
    assert (first["value"], first["verdict"]) == (3.0, "miss")
    assert (second["value"], second["verdict"], second["compared"]) == (12345.0, "pass", None)
    assert math.isnan(third["value"])


def test_a_file_that_is_no_report_is_a_crash(tmp_path: Path) -> None:
    """Half a file, or another program's."""
    for text in ("{", "[]", '{"figures": [{"item": "a"}]}', '{"figures": 3}'):
        path = tmp_path / "x.json"
        path.write_text(text)
        assert outcome_of("bench_x", path).status == "crashed", text


def test_the_page_holds_every_figure_and_escapes_every_name(tmp_path: Path) -> None:
    """Floor, best rival, ours, ratio, machine; nothing of a name is markup."""
    good = written(tmp_path / "fake.json")
    bad = Outcome(HOSTILE, "hung", 9.0, HOSTILE, remarks=[HOSTILE], tail=HOSTILE)
    text = page(HEADING, [good, bad])
    assert "<script" not in text and HOSTILE not in text
    assert escape(HOSTILE) in text
    for part in (
        "1 ms",
        "6 ms",
        "2 ms",
        "3 x",
        "2 x from floor",
        "≥ 4",
        "12,345 B",
        "n/a GB",
        "abc1234",
        "hung",
    ):
        assert part in text, part
    assert text.count("<svg") == 2  # the comparison, and the leads over rivals
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_bars_are_as_long_as_their_values() -> None:
    """Linear where values are near each other: ours is a third of the best rival's length."""
    figure: dict[str, Any] = {
        "item": "a / ours",
        "value": 3.0,
        "unit": "x",
        "compared": comparison().as_dict(),
    }
    picture = pictures("bench_fake", [figure])[0]
    assert picture.lead() == (HOSTILE, 3.0)
    lengths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg(picture))]
    ours, best = lengths[1], lengths[2]
    assert best / ours == pytest.approx(3.0, rel=0.01)


def test_the_report_runs_benches_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that works and one that crashes, then the page again from their files; unknown names are refused."""
    jobs = {
        "bench_store": fake(tmp_path, 2.5).job.command,
        "bench_link": (sys.executable, "-c", "raise SystemExit('broken link')"),
    }
    monkeypatch.setattr(report, "job_of", lambda name, arguments, s: Job(name, jobs[name], s))
    out = tmp_path / "report.html"
    places = ["--out", str(out), "--folder", str(tmp_path / "out"), "--only", "store", "bench_link"]
    assert report.main(places) == 0
    text = out.read_text()
    assert "rival / ours" in text and "broken link" in text and "exit status 1" in text
    assert report.main([*places, "--render"]) == 0
    assert "rival / ours" in out.read_text() and "no bench_link.json" in out.read_text()
    with pytest.raises(SystemExit):
        report.main(["--only", "nothing"])
