"""Shared prefixes in the trajectories of the tasks: teams of scripts play atlas, the factbook and SmolLM2's chat, and a
tiny model with the task's vocabulary has the gradient of rows computed whole."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgrpo.batcher import Batcher, Plan
from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.scripted import ScriptedEngine
from mgrpo.environments.task import Task
from mgrpo.tasks.atlas.chat import AtlasChatTask
from mgrpo.tasks.atlas.chat_calls import render
from mgrpo.tasks.atlas.task import AtlasTask
from mgrpo.tasks.factbook.small.task import SmallTask
from mgrpo.tasks.factbook.task import FactbookTask
from mgrpo.trainers.batch import MicroBatch
from mgrpo.types import Rollout, Trajectory
from tests import test_atlas_chat, test_factbook_play, test_factbook_small
from tests.atlas_scripts import Script, Words, gold_main, gold_sub
from tests.loss_grid import settings
from tests.research_kit import agent, said
from tests.shared_kit import (
    distance,
    embedded,
    furthest,
    gradients,
    policies,
    rows_of_trajectories,
    sampled_near,
    saved_tokens,
    share_everything,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "models" / "smollm2"
END = "<|im_end|>"
QUESTIONS, GROUP = 2, 4


def wavering(script: Callable[[Any], str], others: Sequence[str], seed: int) -> Callable[[Any], str]:
    """Now and then one of the other turns."""
    g = np.random.default_rng(seed)
    return lambda said: others[int(g.integers(len(others)))] if g.random() < 0.25 else script(said)


def played(task: Task, agents: Callable[[int], dict[str, Agent]]) -> dict[str, list[Trajectory]]:
    """Role -> its trajectories in groups of rollouts, as a step trains on them."""
    found: dict[str, list[Trajectory]] = {"main": [], "sub": []}
    for number, question in enumerate(task.questions("train", QUESTIONS, 1)):
        for k in range(GROUP):
            team = agents(number * GROUP + k)
            rollout: Rollout = asyncio.run(task.play(question, Episode(f"{number}", k, team, 1)))
            for trajectory in rollout.trajectories():
                found[trajectory.role].append(trajectory)
    return found


def words_team(task: Any, main: Script, sub: Script, seed: int) -> dict[str, Agent]:
    """Of a task whose tokens are words."""
    language = task.library.language
    words = Words(language)
    others = {
        "main": ["<ans> none .", f"<call> {language.relations[seed % 5]} {language.entities[seed]} ."],
        "sub": ["<ans> none none .", f"<search> {language.entities[seed % 3]} ."],
    }
    return {
        role: Agent(role, engine_of(wavering(script, others[role], seed), words, str.split), words, 1.0, 160)
        for role, script in (("main", main), ("sub", sub))
    }


def engine_of(
    script: Callable[[Any], str], tokenizer: Any, read: Callable[[str], Any] = str, end: str = ""
) -> ScriptedEngine:
    return ScriptedEngine(lambda text: script(read(text)) + end, tokenizer)


def atlas() -> dict[str, list[Trajectory]]:
    task = AtlasTask({})
    return played(task, functools.partial(words_team, task, gold_main, gold_sub))


def factbook() -> dict[str, list[Trajectory]]:
    task = SmallTask({})
    return played(task, functools.partial(words_team, task, gold_main, test_factbook_small.gold_sub))


def smollm2() -> dict[str, list[Trajectory]]:
    """With its own tokenizer and template: system prompt and two examples begin every trajectory of a role."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    task = AtlasChatTask({"hops": [1, 0, 0], "turn_tokens": 32, "max_calls": 2, "max_turns": 4})
    others = [render("answer", value="none"), render("search", query="Suva"), "Let me think."]

    def team(seed: int) -> dict[str, Agent]:
        scripts = {"main": test_atlas_chat.gold_main, "sub": test_atlas_chat.gold_sub}
        engines = {
            role: engine_of(wavering(script, others, seed), tokenizer, end=END)
            for role, script in scripts.items()
        }
        return {role: Agent(role, engine, tokenizer, 1.0, 640) for role, engine in engines.items()}

    return played(task, team)


def whole_factbook() -> dict[str, list[Trajectory]]:
    """Its own prompts and pages, in SmolLM2's tokens and template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    limits = {"turns": 6, "turn_tokens": 120, "answer_tokens": 60, "observation_tokens": 300}
    found: dict[str, list[Trajectory]] = {"main": [], "sub": []}
    with tempfile.TemporaryDirectory() as cache:
        task = FactbookTask(
            {"limits": {**limits, "observation_chars": 1200}, "cache": cache}, ("main", "sub")
        )
        for number, question in enumerate(task.questions("train", 2)):
            scripts = test_factbook_play.oracle_main(question), test_factbook_play.oracle_sub(task, question)
            for k in range(2):
                team = {
                    role: agent(
                        role, wavering(script, [said(report="none")], 2 * number + k), 4000, tokenizer
                    )
                    for role, script in zip(("main", "sub"), scripts, strict=True)
                }
                rollout = asyncio.run(task.play(question, Episode(f"{number}", k, team, 1)))
                for trajectory in rollout.trajectories():
                    found[trajectory.role].append(trajectory)
        asyncio.run(task.close())
    return found


BATCHES: dict[str, tuple[Callable[[], dict[str, list[Trajectory]]], float]] = {
    "atlas": (atlas, 0.1),
    "factbook, its closed view": (factbook, 0.1),
    "factbook": (whole_factbook, 0.4),
    "smollm2": (smollm2, 0.4),
}
"""task -> (its trajectories by role, the least part of their tokens that is shared)."""


@pytest.fixture(scope="module", params=BATCHES)
def batch(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, list[Trajectory]]]]:
    name = request.param
    if name in ("factbook", "smollm2") and not (SMOLLM2 / "tokenizer.json").exists():
        pytest.skip("needs make smollm2-model")
    yield name, BATCHES[name][0]()


@pytest.mark.parametrize("role", ["main", "sub"])
def test_gradients_of_real_batches(
    batch: tuple[str, dict[str, list[Trajectory]]], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they share is computed once, and every weight's gradient is that of whole rows: to 1e-10 in float64, to
    1e-5 of the largest in float32."""
    share_everything(monkeypatch)
    name, trajectories = batch
    rows, tokens = rows_of_trajectories(trajectories[role])
    model = {"vocab_size": tokens, "max_position_embeddings": 1024}
    plain, shared = policies("llama, grouped heads", True, tokens, model)
    rows = sampled_near(plain, rows, np.random.default_rng(1))
    rows.advantages[rows.advantages == 0] = 0.3  # or the learner leaves rows out
    assert saved_tokens(rows) > BATCHES[name][1] * float(rows.lengths.sum())
    loss = settings("dapo")
    expected, metrics = gradients(plain, [rows], loss)
    with embedded(shared) as computed:
        found, of_found = gradients(shared, [rows], loss)
    assert sum(computed) == int((rows.lengths - 1).sum()) - saved_tokens(rows)
    assert distance(found, expected) < 1e-10
    assert of_found == pytest.approx(metrics, rel=1e-9, abs=1e-9)
    plain, shared = policies("llama, grouped heads", False, tokens, model)
    expected, found = (gradients(policy, [rows], loss)[0] for policy in (plain, shared))
    assert furthest(found, expected) < 1e-5


def planned(
    rows: MicroBatch, trajectories: Sequence[Trajectory], capacity: int, **options: bool
) -> tuple[list[MicroBatch], Plan]:
    """The rows as the batcher lays a step of them out. options: of Batcher.plan."""
    role, groups = trajectories[0].role, {t.query for t in trajectories}
    most = 1 + max(t.invocation for t in trajectories)
    batcher = Batcher(GROUP, most, capacity, role=role, arena_bytes=1 << 24)
    counts: Counter[tuple[str, int]] = Counter((t.query, t.rollout) for t in trajectories)
    for i, t in enumerate(trajectories):
        arrays = rows.ids[i].int(), rows.loss_mask[i].byte(), rows.rollout_logprobs[i].float()
        place = t.query, t.rollout, t.invocation, i
        batcher.add(*place, *(x[: len(t)].numpy() for x in arrays), float(rows.advantages[i]), 0)
    for query in groups:
        for k in range(GROUP):
            batcher.seal(query, k, counts[query, k])
    plan = batcher.plan(0, **options)
    micro: list[MicroBatch] = []
    for index in range(plan.n_padded):
        out = plan.padded_buffers(0, index)
        batcher.write_padded(plan, 0, index, out)
        tensors = {name: torch.from_numpy(out[name]) for name in ("ids", "loss_mask", "logprobs", "lengths")}
        held = int(plan.prefixes[0, index])
        micro.append(
            MicroBatch(
                tensors["ids"].long(),
                tensors["loss_mask"] != 0,
                tensors["logprobs"],
                tensors["lengths"].long(),
                torch.from_numpy(out["seg_advantage"]),
                torch.from_numpy(out["seg_weight"]),
                prefix=tensors["ids"][0, :held].long() if held else None,
            )
        )
    return micro, plan


@pytest.mark.parametrize("role", ["main", "sub"])
def test_gradients_of_planned_batches(batch: tuple[str, dict[str, list[Trajectory]]], role: str) -> None:
    """As the batcher packs them: by the tokens that are left, and cut at branches with their prefix held; the gradient
    is that of the layout without sharing, and no micro-batch computes more than its capacity."""
    _, found = batch
    trajectories = found[role]
    rows, tokens = rows_of_trajectories(trajectories)
    model = {"vocab_size": tokens, "max_position_embeddings": 1024}
    plain, shared = policies("llama, grouped heads", True, tokens, model, attention="varlen")
    rows = sampled_near(plain, rows, np.random.default_rng(1))
    rows.advantages[rows.advantages == 0] = 0.3  # or the learner leaves rows out
    loss = settings("dapo")
    longest = int(rows.lengths.max())
    held = 0
    for capacity in (longest + longest // 8, 4 * longest):
        whole, _ = planned(rows, trajectories, capacity)
        expected, metrics = gradients(plain, whole, loss)
        for hold in (False, True):
            micro, plan = planned(rows, trajectories, capacity, share_prefixes=True, hold_prefixes=hold)
            assert len(micro) <= len(whole)
            with embedded(shared) as computed:
                found_here, of_found = gradients(shared, micro, loss)
            assert distance(found_here, expected) < 1e-10
            assert of_found == pytest.approx(metrics, rel=1e-9, abs=1e-9)
            left = sum(int((m.lengths - 1).clamp(min=1).sum()) for m in micro)
            assert plan.shared_tokens == left - sum(computed) and max(computed) <= capacity
            held += sum(m.prefix is not None for m in micro)
    assert held or batch[0] not in ("smollm2", "factbook")  # the others begin with few tokens
