"""The picture of a step whose policy computed shared prefixes once: what the page is told, and what it draws."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mgrpo.config import dump_config, load_config
from mgrpo.config.record import RecordConfig
from mgrpo.metrics import MetricsWriter
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.record.schema import ROW, MiniBatchRecord, StepBody, StepHead, StepSettings
from mgrpo.record.writer import RecordWriter
from mgrpo.types import Rollout, Trajectory
from mgrpo.view.data import RunView
from mgrpo.view.server import export
from mgrpo.view.top import RunStatus, render
from tests.browser import MISSING, Browser, browser
from tests.runs import RELAY
from tests.test_view import no_overflow

needs_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
K, PROMPT, LENGTH = 8, 600, 1001
COMPUTED, SHARED = 10_000, 9_000
SHARES = (0, 0, *[PROMPT] * 5, LENGTH - 1)  # of the rollouts of a group


def step_body(groups: int, kind: str = "shared") -> StepBody:
    """K trajectories of 1,001 tokens a group: 0 is dropped, 1 computes the prompt, 2 to 6 share it, 7 is as 6 is. kind:
    shared, alone (no one shares anything)."""
    rows = np.zeros(groups * K, ROW)
    rows["group"], rows["rollout"] = np.divmod(np.arange(groups * K), K)
    rows["length"], rows["active"], rows["weight"], rows["multiplicity"] = LENGTH, LENGTH - PROMPT, 1.0, 1
    rows["reward"] = rows["correct"] = rows["rollout"] % 2
    rows["advantage"] = np.where(rows["rollout"] % 2, 1.0, -1.0)
    rows["multiplicity"][rows["rollout"] == 0] = 0
    shared = np.array(SHARES if kind == "shared" else [0] * K, "<i4")
    tokens = (COMPUTED // 2, SHARED // 2) if kind == "shared" else ((COMPUTED + SHARED) // 2, 0)
    return StepBody(
        settings=StepSettings(0.1, 1, 1), k=K, queries=[f"0/{g}" for g in range(groups)], indices=list(range(groups)),
        failed=[], mean=[0.5] * groups, std=[0.5] * groups, rows=rows.tobytes(), scores=[{}] * len(rows),
        minibatches=[MiniBatchRecord(1.0, {}, *tokens) for _ in range(2)],
        metrics={"loss/pg": 0.25}, shared=np.tile(shared, groups).tobytes(),
    )  # fmt: skip


def made_up(folder: Path, groups: int = 2, kind: str = "shared") -> Path:
    """A run of one step of main with its rollouts. kind: as of step_body(), or old: recorded before prefixes were."""
    folder.mkdir()
    dump_config(load_config(RELAY), folder / "config.json")
    body = msgspec.to_builtins(step_body(groups, kind), builtin_types=(bytes,))
    if kind == "old":
        del body["shared"]
        for minibatch in body["minibatches"]:
            del minibatch["computed_tokens"], minibatch["shared_tokens"]
    steps = RecordWriter(folder / "agents/main/record", 1 << 24, pytest.fail)
    steps.append(0, msgspec.msgpack.encode(StepHead("main", 0)), msgspec.msgpack.encode(body))
    steps.close()
    recorder = RolloutRecorder(RecordConfig(tokens_every=0), folder / "rollouts" / "0", pytest.fail)
    for group, k in np.ndindex(groups, K):
        main = Trajectory(
            query=f"0/{group}", rollout=k, role="main", invocation=0, tokens=np.arange(4, dtype=np.int32),
            loss_mask=np.array([0, 0, 1, 1], np.uint8), logprobs=np.zeros(4, np.float32),
            versions=np.array([-1, -1, 0, 0], np.int32), scores={},
        )  # fmt: skip
        asked, played = (f"question {group}", "gold"), Rollout(main.query, k, main, {}, float(k % 2), {})
        recorder.train(0, group, main.query, k, asked, played, "")
    recorder.close()
    with MetricsWriter(folder, pytest.fail) as metrics:
        metrics.write(
            1, 1.0, {"main/time/step": 4.0} | {"main/perf/shared": 0.474 if kind == "shared" else 0.0}
        )
    return folder


def test_a_step_tells_what_was_shared(tmp_path: Path) -> None:
    """Sums of the minibatches, and of each trajectory the tokens that another one computed, there and in its tree."""
    view = RunView(made_up(tmp_path / "run"))
    step = view.step("main", 0)
    assert step["tokens"] == {"computed": COMPUTED, "shared": SHARED}
    for group in step["groups"]:
        cells = [cell for rollout in group["rollouts"] for cell in rollout["invocations"]]
        assert [cell["shared"] for cell in cells] == list(SHARES)
    (main,) = view.rollout("0/1/7")["trajectories"]
    assert main["credit"]["shared"] == LENGTH - 1 and main["credit"]["length"] == LENGTH


def test_a_record_of_before_says_nothing(tmp_path: Path) -> None:
    """Neither does one whose numbers of shared tokens are not one a trajectory: no number is shown with a wrong box."""
    step = RunView(made_up(tmp_path / "old", kind="old")).step("main", 0)
    cells = [c for g in step["groups"] for r in g["rollouts"] for c in r["invocations"]]
    assert len(cells) == 2 * K and {c["shared"] for c in cells} == {None} and step["tokens"] is None
    body = step_body(2)
    body.shared = body.shared[:-4]
    run = made_up(tmp_path / "short")
    writer = RecordWriter(run / "agents/main/record", 1 << 24, pytest.fail)
    writer.append(0, msgspec.msgpack.encode(StepHead("main", 0, 1.0)), msgspec.msgpack.encode(body))
    writer.close()
    step = RunView(run).step("main", 0)
    assert step["groups"][1]["rollouts"][7]["invocations"][0]["shared"] is None and step["tokens"] is None


def shown(page: Browser, file: Path, place: str, wait: str) -> None:
    page.open("about:blank")
    page.open(f"{file.as_uri()}#{place}")
    page.until("return document.querySelector(arguments[0]) !== null", wait)


def darkest_and_palest(page: Browser, picture: Image.Image, selector: str) -> tuple[int, int]:
    """Of the grey values inside an element's left half: far apart where it is hatched, alike where it is plain."""
    x, y, width, height = page.run(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.x, b.y, b.width, b.height]",
        selector,
    )
    box = (round(x) + 2, round(y) + 2, round(x + width / 2), round(y + height) - 2)
    grey = np.asarray(picture.convert("L").crop(box))
    return int(grey.min()), int(grey.max())


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_shared_prefixes_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    """Each trained trajectory has a bar, hatched as far as another one computed it; the header has the sums, the title
    of a box its numbers. The hatching is seen without colours."""
    file = tmp_path / "run.html"
    export(made_up(tmp_path / "run"), file)
    with browser(tmp_path, width=width, dark=dark) as page:
        shown(page, file, "tab=steps&role=main&step=0", ".group")
        header = page.run("return document.querySelector('[data-fact=prefixes]').textContent")
        assert header == "9,000 of 19,000 tokens shared (47.4 %), computed 10,000"
        assert "computed once" in page.run("return document.getElementById('bars').textContent")
        assert page.run("return document.querySelector('.group .quiet').textContent").endswith(
            "std 0.500, 4,000 tokens shared"
        )
        bars = page.run(
            "return [...document.querySelectorAll('.group .cell')].map(e => e.querySelector('.hatched')?.style.width"
            " ?? (e.querySelector('.tokens') ? 'none' : 'no bar'))"
        )
        assert bars == ["no bar", "none", *["60%"] * 5, "100%"] * 2
        titles = page.run("return [...document.querySelectorAll('.group .cell')].map(e => e.title)")
        assert titles[2].endswith("minibatch 1, 600 of 1,001 tokens shared")
        page.run("document.querySelector('.group').scrollIntoView()")
        page.picture(tmp_path / "step.png")
        picture = Image.open(io.BytesIO((tmp_path / "step.png").read_bytes()))
        lane = ".group .lane:nth-child({}) .tokens"
        low, high = darkest_and_palest(page, picture, lane.format(3))
        assert high - low > 100
        low, high = darkest_and_palest(page, picture, lane.format(2))
        assert high - low < 5
        assert no_overflow(page)
        shown(page, file, "tab=rollouts&id=0/1/7", "[data-rollout]")
        fact = "return document.querySelector('[data-rollout] [data-fact=\"shared prefix\"]').textContent"
        assert page.run(fact) == "1,000 of 1,001 tokens"
        shown(page, file, "tab=curves", "[data-timeline]")
        last = "return document.querySelector('[data-chart^=\"tokens of shared\"] .legend').textContent"
        assert page.run(last) == "main 0.474"
        assert (
            page.run("return document.querySelector('[data-fact=\"main shared tokens\"]').textContent")
            == "47 %"
        )
        assert no_overflow(page) and page.problems() == []


@needs_browser
@pytest.mark.parametrize("kind", ["old", "alone"])
def test_what_shares_nothing_looks_as_before(tmp_path: Path, kind: str) -> None:
    """No bar, no legend and no number, in the step and in a tree; a step that is known to share nothing says so."""
    file = tmp_path / "run.html"
    export(made_up(tmp_path / "run", kind=kind), file)
    with browser(tmp_path) as page:
        shown(page, file, "tab=steps&role=main&step=0", ".group")
        assert page.run("return document.querySelectorAll('button.cell').length") == 2 * K
        assert page.run("return document.querySelectorAll('.tokens, #bars').length") == 0
        said = page.run(
            "return [...document.querySelectorAll('[data-fact=prefixes]')].map(e => e.textContent)"
        )
        nothing = "0 of 19,000 tokens shared (0 %), computed 19,000"
        assert said == ([] if kind == "old" else [nothing])
        groups = page.run("return [...document.querySelectorAll('.group')].map(e => e.innerHTML).join()")
        assert "shared" not in groups
        shown(page, file, "tab=rollouts&id=0/1/7", "[data-rollout]")
        assert page.run("return document.querySelectorAll('[data-fact=reward]').length") == 1
        assert "shared" not in page.run("return document.querySelector('[data-rollout]').textContent")
        shown(page, file, "tab=curves", "[data-timeline]")
        assert "shared" not in page.run("return document.querySelector('main').textContent")
        assert page.problems() == []


def test_top_has_the_shared_tokens() -> None:
    """A column that is there from the first step on that shared any."""
    status = RunStatus(load_config(RELAY))
    console = Console(width=200, record=True, file=io.StringIO())
    status.take(2, {"main/perf/shared": 0.0})
    console.print(render(status))
    assert "shared" not in console.export_text()
    status.take(3, {"main/perf/shared": 0.474})
    console.print(render(status))
    lines = [line.split() for line in console.export_text().splitlines()]
    head, main = (next(line for line in lines if line[:1] == [name]) for name in ("agent", "main"))
    assert main[head.index("shared")] == "47%"
