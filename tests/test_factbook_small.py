"""The closed view of the factbook: its words, documents, search and demonstrations, and a team that plays in it."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mgrpo.config import load_config
from mgrpo.config.task import TaskConfig
from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.loader import load_task
from mgrpo.environments.task import Question
from mgrpo.tasks.factbook.small.task import SmallTask
from mgrpo.tasks.factbook.small.view import number
from mgrpo.tasks.factbook.world import World
from mgrpo.tasks.words.policy import build_tokenizer
from mgrpo.tasks.words.protocol import NONE, Answer, Open, Search
from mgrpo.tasks.words.questions import plan_of
from mgrpo.types import Rollout
from tests.atlas_scripts import Script, gold_main, scripted
from tests.runs import ROOT

TASK = SmallTask({})
LANGUAGE = TASK.library.language
HOME = dict(zip(LANGUAGE.relations, LANGUAGE.homes, strict=True))
PERMUTED = SmallTask({"facts": "permuted"})


def gold_sub(said: list[str]) -> str:
    """Searches the entity's page that tells the relation, opens it, reads the field."""
    relation, entity = said[1], said[3]
    page = f"{entity} {HOME[relation]}"
    if "<doc>" in said:
        document = said[said.index("<doc>") + 3 :]
        return (
            f"<ans> {relation} {dict(zip(document[::2], document[1::2], strict=True)).get(relation, NONE)} ."
        )
    return f"<open> {page} ." if "<res>" in said else f"<search> {page} ."


def roll(question: Question, task: SmallTask, sub: Script = gold_sub) -> Rollout:
    agents = {
        "main": scripted("main", gold_main, 64, LANGUAGE),
        "sub": scripted("sub", sub, task.positions, LANGUAGE),
    }
    return asyncio.run(task.play(question, Episode("q", 0, agents, 1)))


@pytest.mark.parametrize(
    ("text", "digits", "word"),
    [
        ("18,274 sq km", 2, "18e3"),
        ("$5.841 billion (2024 est.)", 2, "58e8"),
        ("-5.3 migrant(s)/1,000 population", 1, "-5e0"),
        ("61.7% (2023 est.)", 1, "6e1"),
        ("0 km", 1, "0e0"),
        ("0.9 male(s)/female", 2, "90e-2"),
        (".aw", 1, ""),
        ("NA", 1, ""),
    ],
)
def test_numbers_are_rounded_words(text: str, digits: int, word: str) -> None:
    """The number that a text begins with, its scale included."""
    assert number(text, digits) == word


def test_every_document_is_in_words_of_the_language() -> None:
    """All words have one meaning each: a field is no entity, a title is an entity and a section. Nothing is longer than
    a trajectory has room for."""
    words = LANGUAGE.vocabulary
    assert len(set(words)) == len(words) and not any(" " in word for word in words)
    tokenizer = build_tokenizer(words, TASK.positions)
    for i, word in enumerate(words):  # a stop word inside another would be cut out of it
        assert tokenizer.encode(word, add_special_tokens=False) == [i] and tokenizer.decode([i]) == word
    fields = {*LANGUAGE.relations, *LANGUAGE.fields}
    for task in (TASK, PERMUTED):
        for document in task.library.documents.values():
            assert LANGUAGE.is_title(document.title.split())
            assert all(f in fields and v in LANGUAGE.ids and LANGUAGE.is_name(v) for f, v in document.fields)
            assert len(dict(document.fields)) == len(document.fields) and len(document.text.split()) <= 90
    assert load_task(TaskConfig(name="factbook-small"), ("main", "sub")).roles == ("main", "sub")


def test_the_view_tells_what_the_world_says() -> None:
    """Each fact of the world stands on the page of its section and nowhere else; names are folded, numbers rounded."""
    world = World.build()
    letters = {code: re.sub(r"[\W_]", "", name.name) for code, name in world.names.items()}
    seen = 0
    for (code, relation), fact in world.facts.items():
        entity = letters[code]
        if not entity.isascii():
            continue
        told = TASK.library.world.value(relation, entity)
        assert told is not None
        (page,) = (
            section
            for section in LANGUAGE.sections
            if (d := TASK.library.documents.get(f"{entity} {section}")) and d.value(relation) == told
        )
        assert page == HOME[relation]
        if fact.target:
            assert told == letters[fact.target] or not letters[fact.target].isascii()
        elif relation in ("area", "population", "coastline"):
            exact = float(fact.value.replace(",", ""))
            assert abs(float(told) - exact) <= 0.05 * exact + 1e-9
        seen += 1
    assert seen > 2500


def test_permuted_facts_are_the_same_values_elsewhere() -> None:
    """Each relation keeps its values; few entries keep theirs, and no question is answered as in the real world."""
    real, dealt = TASK.library.world.facts, PERMUTED.library.world.facts
    for relation in LANGUAGE.relations:
        count = [Counter(v for (r, _), v in facts.items() if r == relation) for facts in (real, dealt)]
        assert not count[1] - count[0] and (count[0] - count[1]).total() <= 0.1 * count[0].total()
    # Half of the independences are from one country, so many are dealt what they had.
    same = sum(dealt.get(key) == value for key, value in real.items())
    assert same < 0.08 * len(real)
    for question in PERMUTED.questions("heldout", 200, 3):
        assert question.answer != question.info["real_answer"]


def test_a_search_finds_the_page_and_others_like_it() -> None:
    """For every document the query of its title finds it among four distinct ones, in no place more often than chance;
    half of the results are about other entities."""
    places, own = Counter[int](), 0
    for title in list(TASK.library.documents)[::3]:
        found = TASK.library.index.search(title)
        assert len(set(found)) == len(found) == 4 and title in found
        places[found.index(title)] += 1
        own += sum(t.split()[0] == title.split()[0] for t in found)
    total = places.total()
    assert total > 400 and all(abs(places[i] / total - 0.25) < 0.07 for i in range(4))
    assert 1.5 < own / total < 3.0


def test_the_gold_plan_is_always_right() -> None:
    """Following the plan, with the right page for each relation, solves every question of all splits, of the real and
    the permuted world; with random search results nothing does."""
    for task in (TASK, PERMUTED):
        for split in ("train", "validation", "heldout"):
            for question in task.questions(split, 40, seed=2):  # type: ignore[arg-type]
                rollout = roll(question, task)
                assert rollout.correct == 1.0 and rollout.d_k() == {"sub": len(plan_of(question))}
                assert all(t.scores == {"format": 1.0, "expert": 1.0} for t in rollout.invocations["sub"])
    lost = SmallTask({"search": "random"})
    assert sum(roll(q, lost).correct for q in lost.questions("heldout", 20, 2)) == 0.0


def test_one_invocation_word_by_word() -> None:
    """Two words a title; only the agent's own turns carry loss."""
    question = Question("capital of longest_border of Austria", "Berlin")
    rollout = roll(question, TASK)
    assert rollout.info["answer"] == "Berlin"
    first = rollout.invocations["sub"][0]
    words = [LANGUAGE.vocabulary[t] for t in first.tokens]
    said = " ".join(w for w, m in zip(words, first.loss_mask, strict=True) if m)
    assert said == "<search> Austria Geography . <open> Austria Geography . <ans> longest_border Germany ."
    shown = [w for w, m in zip(words, first.loss_mask, strict=True) if not m]
    found = " ".join(TASK.library.index.search("Austria Geography")).split()
    document = TASK.library.documents["Austria Geography"].text.split()
    assert shown == ["<task>", "longest_border", "of", "Austria", "<go>", "<res>", *found, "<doc>", *document]


@pytest.mark.parametrize(
    ("turn", "state", "move"),
    [
        ("<search> Austria Geography .", "search", Search("Austria Geography")),
        ("<search> Austria .", "search", None),
        ("<search> Geography Austria .", "search", None),
        ("<open> Austria Economy .", "open", Open("Austria Economy")),
        ("<open> Austria Economy .", "last", None),
        ("<ans> capital Berlin .", "last", Answer("Berlin", "capital")),
        ("<ans> border_2 Italy .", "last", Answer("Italy", "border_2")),
        ("<ans> Economy Italy .", "last", None),
        ("<ans> capital border_2 .", "last", None),
    ],
)
def test_turns_of_a_sub_agent(turn: str, state: str, move: object) -> None:
    """Queries and titles are an entity and a section; an answer names any field of the documents."""
    assert LANGUAGE.parse_sub(turn, state) == move  # type: ignore[arg-type]


def test_demonstrations_copy_and_choose_at_random() -> None:
    """Every trained turn is legal; the entity is searched for, its section right with .4 and one in six of the rest;
    any of four results is opened, the one searched for with .25 where there is one; values stand in the document. Facts
    do not survive the relabelling."""
    seen, hits = Counter[str](), 0
    demos = TASK.demo_batch("sub", 1, 400, 3)
    for tokens, mask in demos:
        words = [LANGUAGE.vocabulary[t] for t in tokens]
        relation, entity = words[1], words[3]
        query, title = words[6:8], words[words.index("<open>") + 1 :][:2]
        assert words[5] == "<search>" and query[0] == entity
        start = words.index("<res>") + 1
        found = [tuple(words[i : i + 2]) for i in range(start, start + 8, 2)]
        assert tuple(title) in found and len(tokens) <= TASK.positions
        begin = words.index("<doc>") + 1
        assert words[begin : begin + 2] == title
        field, value = words[-3:-1]
        document = dict(zip(words[begin + 2 : -4 : 2], words[begin + 3 : -4 : 2], strict=True))
        assert document.get(field, NONE) == value
        seen["section"] += query[1] == HOME[relation]
        seen["exact"] += title == query
        hits += TASK.library.world.value(relation, entity) == value
        turns = "".join(w + " " for w, m in zip(words, mask, strict=True) if m).split(". ")[:-1]
        for turn, state in zip(turns, ("search", "open", "last"), strict=True):
            assert LANGUAGE.parse_sub(f"{turn}.", state) is not None  # type: ignore[arg-type]
    assert abs(seen["section"] / 400 - (0.4 + 0.6 / 6)) < 0.09
    assert abs(seen["exact"] / 400 - 0.22) < 0.07 and hits < 12
    lengths = np.array([len(t) for t, _ in TASK.demo_batch("main", 0, 100, 0)])
    assert lengths.max() <= 64


def test_a_short_version_of_the_start(tmp_path: Path, one_thread: None) -> None:
    """Fresh policies of both roles learn from a few batches of demonstrations and play a whole rollout."""
    pytest.importorskip("transformers")
    import torch

    from mgrpo.engines.hf.engine import HfEngine
    from mgrpo.model.loading import load_policy
    from mgrpo.trainers.torch.sft import demo_loss

    config = load_config(ROOT / "examples" / "deep_research" / "small.toml")
    agents: dict[str, Agent] = {}
    for role in ("main", "sub"):
        TASK.build_policy(role, 1, str(tmp_path / role))
        policy = load_policy(tmp_path / role)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=TASK.sft_lr(role))
        losses = []
        for step in range(6):
            losses.append(demo_loss(policy, TASK.demo_batch(role, step, 16, 1)))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[0].item() > 6.0 > 5.5 > losses[-1].item()  # log 2122 = 7.7, of words at random
        length = config.agents[role].max_length
        agents[role] = Agent(role, HfEngine(policy), policy.tokenizer, 1.0, length)
    rollout = asyncio.run(TASK.play(TASK.question(0, 1), Episode("q", 0, agents, 1)))
    assert rollout.correct == 0.0
