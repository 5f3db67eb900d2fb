"""The run page: what it is told, who may ask, and how it looks and behaves in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgrpo.addresses import is_loopback
from mgrpo.config.record import RecordConfig
from mgrpo.errors import ConfigError
from mgrpo.record.notes import Notes
from mgrpo.record.reader import RecordedRollout, Recording
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.types import Rollout, Trajectory
from mgrpo.view.data import RunView
from mgrpo.view.server import as_json, export
from tests.big_run import multiply
from tests.browser import MISSING, Browser, browser
from tests.runs import command, started

needs_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
EVIL = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>\x1b[31m\u202eabc & <b>q</b>"


@contextmanager
def served(run: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address that `mgrpo view` prints."""
    with started(command("view", str(run), "--port", "0", *options)) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line
        yield found[0], process


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def numbers_of(run: Path) -> tuple[str, Any, int, int]:
    """(rollout, recorded row, group, step) of an invocation of "left" with a group that differs."""
    recording = Recording([run])
    for (role, step), record in recording.steps.items():
        body = record.body()
        if role == "left" and max(body.std) > 0:
            table = body.table()
            group = int(np.argmax(body.std))
            row = table[(table["group"] == group) & (table["multiplicity"] > 0)][0]
            return f"{body.queries[group]}/{row['rollout']}", row, group, step
    raise AssertionError("no group of left differs")


def add_rollout(run: Path, question: str, answer: str, valid: bool = True) -> str:
    """Record one more rollout, as a worker would. valid: its format."""
    recorder = RolloutRecorder(RecordConfig(), run / "rollouts" / "7", print)
    ids, mask = np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], np.uint8)
    main = Trajectory(
        query="99/0", rollout=0, role="main", invocation=0, tokens=ids, loss_mask=mask,
        logprobs=-mask.astype(np.float32), versions=np.where(mask, 5, -1).astype(np.int32),
        scores={"format": float(valid)},
    )  # fmt: skip
    recorder.train(
        99, 0, "99/0", 0, (question, "gold"), Rollout("99/0", 0, main, {}, 0.0, {"answer": answer}), ""
    )
    recorder.close()
    return "99/0/0"


def test_numbers_are_those_of_the_trainers(recorded: Path) -> None:
    """The tree, the step and the list show one trajectory's numbers bit for bit as its trainer recorded them."""
    rollout, row, group, step = numbers_of(recorded)
    view = RunView(recorded)
    body = Recording([recorded]).steps["left", step].body()
    tree = view.rollout(rollout)
    (call,) = [
        t for t in tree["trajectories"] if (t["role"], t["invocation"]) == ("left", int(row["invocation"]))
    ]
    for name in ("reward", "weight", "multiplicity", "minibatch"):
        assert call["credit"][name] == row[name].item()
    assert call["credit"]["advantage"] == float(row["advantage"])
    assert (call["credit"]["mean"], call["credit"]["std"]) == (body.mean[group], body.std[group])
    assert sum(t["tokens"] for t in call["turns"]) == call["tokens"] == row["length"]
    assert sum(t["tokens"] for t in call["turns"] if t["sampled"]) == row["active"]
    alignment = view.step("left", step)
    cells = alignment["groups"][group]["rollouts"][int(row["rollout"])]["invocations"]
    assert call["credit"].items() >= cells[int(row["invocation"])].items()
    overview = view.overview()
    json.dumps(overview, allow_nan=False)
    place = overview["rollouts"]["id"].index(rollout)
    mine = body.table()[(body.table()["group"] == group) & (body.table()["rollout"] == row["rollout"])]
    assert overview["rollouts"]["reward"]["left"][place] == pytest.approx(mine["reward"].mean())


def test_a_tree_shows_what_each_reward_is_made_of(recorded: Path, tmp_path: Path) -> None:
    """Weight and score of every part; an invalid format is marked where the gate makes it earn 0."""
    rollout, row, _, _ = numbers_of(recorded)
    call = next(
        t
        for t in RunView(recorded).rollout(rollout)["trajectories"]
        if (t["role"], t["invocation"]) == ("left", int(row["invocation"]))
    )
    assert [(p["name"], p["weight"]) for p in call["parts"]] == [
        ("format", 0.1),
        ("outcome", 0.5),
        ("expert", 0.4),
    ]
    assert sum(p["weight"] * p["score"] for p in call["parts"]) == pytest.approx(row["reward"])
    assert not call["gated"]
    out = tmp_path / "run"
    shutil.copytree(recorded, out)
    for gate in (True, False):
        config = json.loads((out / "config.json").read_text())
        config["agents"]["main"]["reward"]["gate"] = gate
        (out / "config.json").write_text(json.dumps(config))
        (main,) = RunView(out).rollout(add_rollout(out, "q", "a", valid=False))["trajectories"]
        assert main["gated"] is gate


def test_trees_keep_the_order_of_what_happened(recorded: Path) -> None:
    """Each invocation knows where in the main agent's trajectory it was opened."""
    view = RunView(recorded)
    seen = 0
    for rollout in view.ids():
        tree = view.rollout(rollout)
        main = [t for t in tree["trajectories"] if t["role"] == "main"]
        places = [t["opened_at"] for t in tree["trajectories"] if t["role"] != "main"]
        assert all(0 < place < main[0]["tokens"] for place in places)
        seen += len(places)
    assert seen > 50


def test_loopback_only_unless_told_otherwise(recorded: Path) -> None:
    """Without a token the server answers requests that name loopback; elsewhere it asks for the token it printed."""
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org") and not is_loopback("10.0.0.1")
    with served(recorded) as (url, _):
        status, page = get(url)
        assert status == 200 and "<script" in page
        assert get(url, Host="attacker.example")[0] == 403
        assert get(url + "api/run", Host="attacker.example")[0] == 403
        assert get(url + "api/rollout?id=nope") == (404, "rollout 'nope' is not in the record")
        assert get(url + "api/step?role=left&step=x")[0] == 404
    with served(recorded, "--host", "0.0.0.0") as (url, _):
        base, _, token = url.replace("0.0.0.0", "127.0.0.1").partition("?token=")
        assert len(token) >= 32
        assert get(base)[0] == 403 and get(base + "api/run")[0] == 403
        assert get(base + "api/run?token=wrong")[0] == 403
        assert get(base + "?token=" + token)[0] == 200
        assert get(base + "api/run", Cookie=f"mgrpo-token={token}")[0] == 200


def played_in(run: Path) -> int:
    """Rollouts of training that did not fail; a trainer's last 12 steps are all of the run's."""
    return sum(r.head.status == "ok" for r in rollouts_of(run))


def no_overflow(page: Browser) -> bool:
    return bool(page.run("return document.documentElement.scrollWidth <= innerWidth"))


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_the_page_in_a_browser(recorded: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Every view opens without a complaint, filters filter, the tree shows the right numbers, nothing overflows."""
    rollout, row, _, _ = numbers_of(recorded)
    with served(recorded) as (url, _), browser(tmp_path, width=width, dark=dark) as page:
        page.open(url)
        page.until("return document.querySelectorAll('figure svg').length >= 8")
        page.until("return document.querySelector('[data-timeline]') !== null")
        drawn = page.run(
            "return [...document.querySelectorAll('[data-timeline] [data-part]')].map(e => e.dataset.part)"
        )
        assert drawn.count("train") == 3 * 12 and drawn.count("played") >= played_in(recorded)
        assert no_overflow(page)
        page.click("[data-tab=steps]")
        page.until("return document.querySelectorAll('.group').length === 4")
        assert page.run("return document.querySelectorAll('button.cell').length") > 0
        assert no_overflow(page)
        page.click("[data-tab=rollouts]")
        page.until("return document.querySelectorAll('tr[data-id]').length === 50")
        page.type("[name=q]", rollout)
        page.type("[name=status]", "")
        assert page.until("return document.getElementById('count').textContent").startswith("1 of ")
        page.click(f"tr[data-id='{rollout}']")
        call = f"[data-call='left/{row['invocation']}']"
        page.until("return document.querySelector(arguments[0]) !== null", call)
        facts = page.run(
            "return Object.fromEntries([...document.querySelector(arguments[0]).querySelectorAll('[data-fact]')]"
            ".map(e => [e.dataset.fact, e.parentNode.title + ' ' + e.textContent]))",
            call,
        )
        assert facts["reward"] == f"reward {row['reward']!s} {row['reward']:.3f}"
        assert facts["multiplicity"].endswith(f"×{row['multiplicity']}")
        assert facts["advantage"].split()[1] == repr(float(row["advantage"])).removesuffix(".0")
        assert no_overflow(page)
        page.type("[name=q]", "")
        page.type("[name=status]", "failed")
        failed = page.run("return document.getElementById('count').textContent")
        played = sum(r.head.split == "train" for r in Recording([recorded]).rollouts.values())
        assert failed.startswith(f"{played // 4} of ")  # one of four rollouts of each group
        page.click("[data-tab=compare]")
        page.until("return document.querySelectorAll('#after .turn').length > 0")
        assert no_overflow(page)
        background = page.run("return getComputedStyle(document.body).backgroundColor")
        channels = [int(c) for c in re.findall(r"\d+", background)[:3]]
        assert max(channels) < 60 if dark else min(channels) > 200
        assert page.problems() == []


@needs_browser
def test_ten_thousand_rollouts_are_listed_and_found(recorded: Path, tmp_path: Path) -> None:
    """A long run's page holds every rollout, draws one page of them, and opens the last one with its own numbers
    (bench/bench_view.py measures how soon)."""
    n = multiply(recorded, tmp_path / "run", 10_000)
    last = RunView(tmp_path / "run").ids()[-1]
    with served(tmp_path / "run") as (url, _), browser(tmp_path) as page:
        page.open(url + "#tab=rollouts")
        count = page.until("const c = document.getElementById('count'); return c && c.textContent")
        assert int(count.split()[0]) == n >= 10_000
        assert page.run("return document.querySelectorAll('tr[data-id]').length") == 50
        page.type("[name=q]", last)
        page.click(f"tr[data-id='{last}']")
        page.until("return document.querySelector('[data-rollout]')?.dataset.rollout === arguments[0]", last)
        step = int(last.split("/")[0])
        page.type("[name=q]", "")
        page.type("[name=from]", str(step))
        count = page.run("return document.getElementById('count').textContent")
        assert int(count.split()[0]) == sum(r.head.step == step for r in rollouts_of(tmp_path / "run"))
        page.click("[data-tab=steps]")
        page.until("return document.querySelector('[name=step]')?.value === arguments[0]", str(step))
        assert page.problems() == []


def rollouts_of(run: Path) -> list[RecordedRollout]:
    """Of training."""
    return [r for r in Recording([run]).rollouts.values() if r.head.split == "train"]


@needs_browser
def test_what_cannot_be_read_any_more_ends_no_page(recorded: Path, tmp_path: Path) -> None:
    """A segment that is deleted to keep the bound while the page is open, a damaged one, a tokenizer without bytes: the
    page shows the rest and names what is missing, and numbers that are not finite are JSON all the same."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    rollout, *_ = numbers_of(run)
    (run / "rollouts" / "0" / "main.tokenizer.json").write_bytes(b"")
    view = RunView(run)
    (run / "agents" / "left" / "record" / "000001.rec").unlink()
    right = run / "agents" / "right" / "record" / "000001.rec"
    data = bytearray(right.read_bytes())
    data[len(data) // 2] ^= 1
    right.write_bytes(data)
    overview = view.overview()
    assert overview["rollouts"]["total"] == len(view.ids()) > 0
    assert all(reward is None for reward in overview["rollouts"]["reward"]["left"])
    assert any(reward is not None for reward in overview["rollouts"]["reward"]["main"])
    with pytest.raises(ConfigError, match="not in the record"):
        view.step("left", 3)
    assert view.rollout(rollout)["trajectories"][0]["turns"]
    Notes(run / "rollouts" / "0").add("recording stopped at step 7: No space left on device")
    assert any("No space left" in note for note in view.overview()["notes"])
    export(run, tmp_path / "page.html", trees=4)
    assert "No space left" in (tmp_path / "page.html").read_text()
    odd = as_json({"a": [float("nan"), 1.5, {"b": float("inf")}], "c": "NaN"})
    assert json.loads(odd, parse_constant=pytest.fail) == {"a": [None, 1.5, {"b": None}], "c": "NaN"}


def test_an_exported_file_works_from_disk(recorded: Path, tmp_path: Path) -> None:
    """One file, no server: curves, steps and trees are in it, and it asks the network for nothing."""
    rollout, _, _, step = numbers_of(recorded)
    file = tmp_path / "run.html"
    export(recorded, file)
    with browser(tmp_path) as page:
        page.open(f"{file.as_uri()}#tab=rollouts&id={rollout}")
        page.until("return document.querySelector('[data-rollout]') !== null")
        page.open("about:blank")
        page.open(f"{file.as_uri()}#tab=steps&role=left&step={step}")
        page.until("return document.querySelectorAll('.group').length === 4")
        asked = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert [name for name in asked if not name.startswith("data:")] == []
        assert page.problems() == []


@needs_browser
def test_markup_in_texts_stays_text_and_a_live_run_is_followed(recorded: Path, tmp_path: Path) -> None:
    """A rollout that is recorded while the page is open appears; its question and answer are shown, never obeyed."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    with served(run) as (url, _), browser(tmp_path) as page:
        page.open(url + "#tab=rollouts")
        before = page.until("const c = document.getElementById('count'); return c && c.textContent")
        evil = add_rollout(run, EVIL, EVIL)
        page.until("return document.getElementById('count').textContent !== arguments[0]", before)
        page.type("[name=q]", evil)
        page.click(f"tr[data-id='{evil}']")
        shown = page.until("const h = document.querySelector('.tree h2'); return h && h.textContent")
        assert "<img src=x" in shown and "␛[31m" in shown and "[U+202E]" in shown
        page.click("[data-tab=curves]")
        assert page.run("return [window.hacked, document.querySelectorAll('main img, main b').length]") == [
            None,
            0,
        ]
        assert page.problems() == []
    file = tmp_path / "run.html"
    export(run, file)
    assert file.read_text().count("</script>") == 2  # the data's and the program's own ends
    with browser(tmp_path) as page:
        page.open(f"{file.as_uri()}#tab=rollouts&id={evil}")
        page.until("return document.querySelector('.tree h2') !== null")
        assert page.run("return window.hacked") is None and page.problems() == []
