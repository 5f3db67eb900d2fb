"""A run of agents.main alone is single-agent GRPO: the same engine, store, loss, record and page."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgrpo.cli.cluster.plan import Site, make_plan
from mgrpo.config import load_config
from mgrpo.environments.loader import load_task
from mgrpo.errors import ConfigError
from mgrpo.pipeline.replay import EQUAL, Replayer
from mgrpo.record.reader import Recording
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.view.data import RunView
from tests.browser import MISSING, browser
from tests.question_kit import files_with
from tests.relay import KEY_ENV, SECRETS
from tests.runs import ALONE, ROOT, final_weights, leftovers, records, resume, summary, train
from tests.test_cli import mgrpo, refused
from tests.test_view import served
from tests.test_watch import output


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one agent."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    train(ALONE, out)
    return out


def test_one_agent_trains(alone: Path) -> None:
    """Three steps with rewards that differ; no figure of a sub-agent anywhere, and nothing left behind."""
    rows = [r for r in records(alone) if "main/reward/mean" in r]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert any(r["main/advantage/frac_zero"] < 1 for r in rows)
    assert all(r["main/align/dup_ratio"] == r["main/align/drop_ratio"] == 0 for r in rows)
    assert not [name for r in records(alone) for name in r if "d_k" in name]
    data = summary(alone)
    assert data["finished"] and data["valid"] and data["steps"] == 3 and data["d_k"] == {}
    start = (alone / "agents" / "main" / "start" / "model.safetensors").read_bytes()
    assert final_weights(alone).keys() == {"main"} and final_weights(alone)["main"] != start
    assert leftovers(alone) == []


def test_a_resumed_run_ends_with_the_same_bits(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, then one more from the checkpoint: the weights of the run that was never interrupted. It is evaluated
    on secret questions: no file of it holds one, its answer or the key of a service, whatever the task says of them."""
    out, key = tmp_path / "run", "sk-0123-of-a-service"
    monkeypatch.setenv(KEY_ENV, key)
    train(ALONE, out, "trainer.steps=2", "task.options.secret=true")
    resume(out, "trainer.steps=3")
    assert final_weights(out) == final_weights(alone)
    assert files_with(out, *SECRETS, key) == set()
    asked = load_task(recorded_run(out).task, ["main"]).question(0, recorded_run(out).seed).text
    assert {"store.db", "rollouts/0/000001.rec"} <= files_with(out, asked)  # the search finds what is there
    kept = [r for r in Recording([out]).rollouts.values() if r.head.split != "train"]
    assert {r.head.status for r in kept} == {"ok", "failed"} and all(r.head.redacted for r in kept)
    tokens = [t.tokens + t.logprobs for r in kept for t in r.body().trajectories]
    assert tokens and not any(tokens) and {r.body().info.get("question_id", "secret-1") for r in kept} == {
        f"secret-{i}" for i in range(8)
    }  # fmt: skip


def test_every_rollout_replays(alone: Path) -> None:
    """Reward, advantage, alignment, batch and loss of every training rollout are rebuilt bit for bit."""
    recording = Recording([alone])
    replayer = Replayer(recorded_run(alone), recording, RunFolder(alone).agent)
    trained = [i for i, r in recording.rollouts.items() if r.head.split == "train"]
    assert len(trained) == 3 * 4 * 4
    for rollout in trained:
        stages = replayer.replay(rollout)
        assert [(s.role, s.status) for s in stages] == [("main", EQUAL)] * 5, stages


def test_it_is_shown(alone: Path) -> None:
    """`mgrpo top`, and what the page reads: overview, steps and trees."""
    assert "3/3" in next(line for line in output("top", str(alone)).splitlines() if line.startswith("main"))
    view = RunView(alone)
    overview = view.overview()
    assert overview["settings"]["roles"] == ["main"] and overview["rollouts"]["d_k"] == {}
    assert len(view.step("main", 2)["groups"]) == 4
    assert [t["role"] for t in view.rollout("2/8/1")["trajectories"]] == ["main"]


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
def test_its_page_opens(alone: Path, tmp_path: Path) -> None:
    """Curves, steps, rollouts and trees in a real browser, without a complaint."""
    with served(alone) as (url, _), browser(tmp_path) as page:
        page.open(url)
        page.until("return document.querySelectorAll('figure svg').length >= 6")
        page.click("[data-tab=steps]")
        page.until("return document.querySelectorAll('.group').length === 4")
        page.click("[data-tab=rollouts]")
        page.click("tr[data-id='2/8/1']")
        page.until("return document.querySelectorAll('[data-rollout] .turn').length > 0")
        page.click("[data-tab=compare]")
        page.until("return document.querySelectorAll('#after .turn').length > 0")
        assert page.problems() == []


def test_it_is_planned_for_a_cluster() -> None:
    """One trainer beside store, monitor and worker."""
    plan = make_plan(ALONE, [], Site(Path("/run"), "python", None, {"main": "n1"}, 5600, 8))
    assert [part.name for part in plan.parts] == ["store", "monitor", "trainer-main", "rollout-0"]


def test_compare_refuses_it(tmp_path: Path) -> None:
    """There is no co-training to compare with."""
    line = refused(mgrpo("compare", str(ALONE), "--out", str(tmp_path / "compare")))
    assert "compare needs a sub-agent beside agents.main" in line
    assert not (tmp_path / "compare").exists()


def test_its_only_agent_must_train() -> None:
    """A frozen one, or one that shares a policy with nobody, is no run."""
    with pytest.raises(ConfigError, match="every agent is frozen"):
        load_config(ALONE, ["agents.main.frozen=true"])
    with pytest.raises(ConfigError, match=r"agents\.main\.shares='sub'"):
        load_config(ALONE, ["agents.main.shares=sub"])


def test_the_example_is_valid() -> None:
    """examples/atlas/alone.toml: the built-in task takes one agent."""
    config = load_config(ROOT / "examples" / "atlas" / "alone.toml")
    assert load_task(config.task, config.roles).roles == ("main",)
