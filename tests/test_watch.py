"""Looking on: the live table of a run, and a talk with its agents."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from mgrpo.config import config_digest, load_config
from mgrpo.run.processes import run_params
from mgrpo.run.text import clean
from mgrpo.store.client import LauncherClient
from mgrpo.store.worker_client import WorkerClient
from mgrpo.view.data import RunView
from mgrpo.view.top import Watcher
from tests.runs import RELAY, command, records, started, wait_for
from tests.test_run import free_ports


def output(*arguments: str) -> str:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_top_shows_the_last_numbers_of_every_agent(recorded: Path) -> None:
    """A run that has ended: every role's row holds what metrics.jsonl ends with."""
    shown = output("top", str(recorded))
    for role in ("main", "left", "right"):
        last = [r for r in records(recorded) if f"{role}/reward/mean" in r][-1]
        row = next(line.split() for line in shown.splitlines() if line.startswith(role))
        assert row[1] == "12/12" and row[2] == f"{last[f'{role}/reward/mean']:.3f}"
        assert row[3] == f"{last[f'{role}/reward/correct']:.2f}"
    places = next(line for line in shown.splitlines() if line.startswith("rollouts "))
    assert set("▁▂▃▄▅▆▇█") & set(places) and "places that hold a rollout" in shown
    assert re.search(r"rollout places \d+% busy", shown)
    assert "heldout at step 12: sampled" in shown and "no answer from the store" in shown


def test_top_follows_a_run_on_addresses(tmp_path: Path) -> None:
    """With nothing but the config file: what the store knows, as it comes in, without taking part in the run."""
    url = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    ports = free_ports(3)
    sets = [f"store.url={url}"]
    sets += [
        f"agents.{r}.url=tcp://127.0.0.1:{p}" for r, p in zip(("main", "left", "right"), ports, strict=True)
    ]
    config = load_config(RELAY, sets)
    file = tmp_path / "run.toml"
    tree = json.loads(config.model_dump_json())
    file.with_suffix(".json").write_text(json.dumps(tree))
    arguments = ["store", "--config", str(RELAY), "--out", str(tmp_path / "store")]
    with started(command(*arguments, *(f"--set={s}" for s in sets))):
        with LauncherClient(url, "launcher", timeout=30.0) as launcher:
            launcher.create(run_params(config))
            launcher.set_control("running")
        with (
            WorkerClient(url, "worker", name="w", run=config_digest(config), timeout=10.0) as worker,
            Watcher(file.with_suffix(".json")) as watcher,
        ):
            watcher.refresh()
            assert watcher.status.state == "running" and watcher.status.steps["left"] == 0
            metrics = {"left/reward/mean": 0.5, "left/time/step": 2.0, "left/align/dup_ratio": 0.25}
            worker.report("step", {"role": "left", "step": 7, "metrics": metrics})
            wait_for(lambda: watcher.refresh() or watcher.status.steps["left"] == 7, "the report", 10)
            assert watcher.status.left() == (config.trainer.steps - 7) * 2.0
            assert watcher.status.value("left/align/dup_ratio") == 0.25
            assert watcher.status.stats is not None and set(watcher.status.stats["roles"]) == set(
                config.roles
            )


def test_chat_is_the_evaluation_turn_by_turn(recorded: Path) -> None:
    """The greedy answer to a question that was evaluated: the same agents say the same words in the same order."""
    view = RunView(recorded)
    tree = view.rollout("eval/heldout/12/greedy/0/0")
    shown = output("chat", str(recorded), tree["question"])
    said: dict[str, list[str]] = {}
    for who, text in re.findall(r"^ *(main|left \d|right \d) +> (.*)$", shown, re.MULTILINE):
        said[who] = [*said.get(who, []), text]
    for t in tree["trajectories"]:
        name = t["role"] if t["role"] == "main" else f"{t['role']} {t['invocation'] + 1}"
        expected = " ".join(turn["text"] for turn in t["turns"] if turn["sampled"])
        assert " ".join(said[name]) == expected
    assert len(said) == len(tree["trajectories"])


def test_no_text_reaches_the_terminal_as_a_command(recorded: Path) -> None:
    """Escape sequences and direction marks are shown as signs, whoever wrote them."""
    assert clean("a\x1b[31mb\r\x07\u202ec\nd") == "a␛[31mb␍␇[U+202E]c\nd"
    shown = output("chat", str(recorded), "w1 \x1b[2Jw2 [bold]w3[/bold]")
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["top", "nowhere"], "not a run's folder"),
        (["top", str(RELAY)], "store.url is not set"),
        (["chat", "nowhere"], "not a run's folder"),
        (["replay", "nowhere", "--sample", "1"], "not a run's folder"),
        (["view", "nowhere"], "not a run's folder"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], expected: str) -> None:
    """Exit status 2 and a line that says what was expected."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr
