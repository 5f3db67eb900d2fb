"""Start validation: scripted teams whose figures are known."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mgrpo.config import config_digest, load_config
from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.task import StartReport
from mgrpo.tasks.atlas.task import AtlasTask
from tests.atlas_scripts import Script, Words, gold_main, gold_sub, scripted

TASK = AtlasTask({})


def report(main: Script, sub: Script) -> StartReport:
    agents = {"main": scripted("main", main), "sub": scripted("sub", sub)}
    return asyncio.run(TASK.validate_start(agents, 40, 5))


def values(found: StartReport) -> dict[str, float]:
    return {name: value for name, (value, _, _) in found.figures.items()}


def test_a_team_that_knows_the_plan_is_refused() -> None:
    """Gold scripts have every skill, but leave nothing to learn."""
    found = report(gold_main, gold_sub)
    assert set(values(found).values()) == {1.0} and not found.valid
    assert "joint_greedy 1.000 (outside 0..0.4)" in str(found)


def test_an_agent_alone_is_measured_alone() -> None:
    """Without a sub-agent the tool answers for certain: copying and two hops, judged by the same bounds."""
    task = AtlasTask({}, ["main"])
    agents = {"main": scripted("main", gold_main)}
    found = asyncio.run(task.validate_start(agents, 40, 5))
    assert values(found) == {"main_copy": 1.0, "main_two_hops": 1.0} and not found.valid
    question = task.question(3, 1)
    rollout = asyncio.run(task.play(question, Episode("q", 0, agents, 1)))
    assert rollout.correct == 1.0 and rollout.invocations == {}
    assert [call["result"] for call in rollout.info["calls"]][-1] == question.answer  # type: ignore[attr-defined]


def test_skills_without_a_plan() -> None:
    """A main agent that answers with what it was asked about copies well and solves nothing."""
    found = values(report(lambda said: f"<ans> {said[said.index('<go>') - 1]} .", gold_sub))
    assert found == {
        "main_copy": 1.0,
        "sub_copy": 1.0,
        "main_two_hops": 0.0,
        "joint_sampled": 0.0,
        "joint_greedy": 0.0,
    }


def test_an_invented_name_is_not_a_copy() -> None:
    """Naming something unseen, searching another word or changing the value breaks the copy figures."""
    found = values(
        report(lambda said: "<ans> Oslo .", lambda said: gold_sub(said).replace("<search>", "<search> Oslo"))
    )
    assert found["main_copy"] < 0.1 and found["sub_copy"] == 0.0

    def other_query(said: list[str]) -> str:
        return "<search> Oslo ." if "<res>" not in said else gold_sub(said)

    def other_value(said: list[str]) -> str:
        return gold_sub(said) if "<doc>" not in said else "<ans> capital Oslo ."

    assert values(report(gold_main, other_query))["sub_copy"] < 0.1
    assert values(report(gold_main, other_value))["sub_copy"] < 0.1


def test_half_a_plan_scores_between() -> None:
    """A team that solves single hops only gets the share of single hops."""

    def first_hop(said: list[str]) -> str:
        return f"<ans> {said[-1]} ." if "<res>" in said else gold_main(said)

    found = values(report(first_hop, gold_sub))
    assert found["joint_sampled"] == found["joint_greedy"] == 0.25 and found["main_two_hops"] == 0.0


def test_built_policies_play_and_are_no_valid_start(tmp_path: Path) -> None:
    """Fresh policies load from their folders, speak the task's vocabulary, and are no valid start."""
    pytest.importorskip("transformers")
    from mgrpo.engines.hf.engine import HfEngine
    from mgrpo.model.loading import load_policy

    agents: dict[str, Agent] = {}
    for i, role in enumerate(TASK.roles):
        TASK.build_policy(role, i, str(tmp_path / role))
        policy = load_policy(tmp_path / role)
        agents[role] = Agent(role, HfEngine(policy), policy.tokenizer, 1.0, 64)
    found = asyncio.run(TASK.validate_start(agents, 16, 0))
    assert not found.valid and values(found)["sub_copy"] == 0.0
    words, tokenizer = Words(), agents["main"].tokenizer
    text = "<q> people of neighbour of country of Suva <go> +679 en_ none ."
    assert tokenizer.encode(text, add_special_tokens=False) == words.encode(text)
    assert tokenizer.decode(words.encode(text)) == text


def test_the_width_of_fresh_policies_is_an_option(tmp_path: Path) -> None:
    """task.options.width, 64 unless set; another width is another computation."""
    for width, options in ((64, {}), (96, {"width": 96})):
        AtlasTask(options).build_policy("main", 1, str(tmp_path / str(width)))
        config = json.loads((tmp_path / str(width) / "config.json").read_text())
        assert (config["hidden_size"], config["intermediate_size"]) == (width, 3 * width)
    atlas = Path(__file__).parent.parent / "examples" / "atlas" / "atlas.toml"
    digests = {config_digest(load_config(atlas, sets)) for sets in ([], ["task.options.width=96"])}
    assert len(digests) == 2


def test_fresh_policies_depend_on_the_seed_only(tmp_path: Path) -> None:
    """The same seed writes the same weights; roles with other seeds differ."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        TASK.build_policy("sub", seed, str(tmp_path / name))
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
