"""Demonstrations for SFT: exact skills, random strategies, no facts."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

from mgrpo.environments.episode import Conversation, Episode
from mgrpo.environments.task import Question
from mgrpo.tasks.atlas.facts import RELATIONS, entities
from mgrpo.tasks.atlas.language import language
from mgrpo.tasks.atlas.task import AtlasTask
from mgrpo.tasks.words.play import play_sub
from mgrpo.tasks.words.protocol import NONE, Call
from mgrpo.tasks.words.questions import plan_of
from tests.atlas_scripts import gold_main, gold_sub, scripted

TASK = AtlasTask({})
WORDS = language().vocabulary
ENTITIES = frozenset(entities())
Demo = tuple[list[str], list[int]]


def batch(role: str, step: int = 0, size: int = 400) -> list[Demo]:
    rows = TASK.demo_batch(role, step, size, 11)
    return [([WORDS[t] for t in tokens], mask.tolist()) for tokens, mask in rows]


def turns(demo: Demo) -> list[tuple[bool, list[str]]]:
    """Runs of equal mask: (trained on?, words). Turns of the agent that follow each other do not occur."""
    runs: list[tuple[bool, list[str]]] = []
    for word, mask in zip(*demo, strict=True):
        if not runs or runs[-1][0] != bool(mask):
            runs.append((bool(mask), []))
        runs[-1][1].append(word)
    return runs


def test_sub_demos_keep_the_protocol_and_copy() -> None:
    """Every trained run is a legal turn; the query is the entity; opened titles were found; values stand in the last
    document under the field, or are `none` for an asked relation that is absent."""
    seen = Counter[str]()
    for demo in batch("sub"):
        runs = turns(demo)
        assert not runs[0][0] and runs[-1][0]
        relation, entity = runs[0][1][1], runs[0][1][3]
        assert runs[0][1] == ["<task>", relation, "of", entity, "<go>"]
        assert runs[1][1] == ["<search>", entity, "."]
        found = runs[2][1][1:]
        assert len(found) == 3 and len(set(found)) == 3
        state, document, opened = "open", [""], []
        for trained, words in runs[3:]:
            if not trained:
                document = words
                assert words[:2] == ["<doc>", opened[-1]] and len(words) in (4, 14, 16)
                continue
            assert language().parse_sub(" ".join(words), state) is not None  # type: ignore[arg-type]
            if words[0] == "<open>":
                opened.append(words[1])
                state = "read" if len(opened) == 1 else "last"
        assert set(opened) <= set(found) and len(set(opened)) == len(opened)
        fields = dict(zip(document[2::2], document[3::2], strict=True))
        field, value = runs[-1][1][1:3]
        assert fields.get(field, NONE) == value
        assert value != NONE or (field == relation and field not in fields)
        seen["opened the entity" if opened[0] == entity else "opened another"] += 1
        seen["twice"] += len(opened) == 2
        seen["none"] += value == NONE
    assert abs(seen["opened the entity"] / 400 - 1 / 3) < 0.1  # all three results alike
    assert abs(seen["twice"] / 400 - 0.35) < 0.08 and 0.05 < seen["none"] / 400 < 0.4


def test_main_demos_keep_the_protocol_and_copy() -> None:
    """Every trained run is a legal turn and names only what was seen; half of the plans at most are right."""
    strategies = Counter[str]()
    for demo in batch("main"):
        runs = turns(demo)
        question = runs[0][1]
        assert question[0] == "<q>" and question[-1] == "<go>" and len(question) in (5, 7, 9)
        plan = plan_of(Question(" ".join(question[1:-1]), ""))
        known, said, last = {question[-2]}, [], question[-2]
        for trained, words in runs[1:]:
            if not trained:
                assert words[0] == "<res>" and len(words) == 2
                last = words[1]
                known.add(last)
                continue
            move = language().parse_main(" ".join(words))
            assert move is not None
            if isinstance(move, Call):
                assert move.entity in known
                said.append(move.relation)
            else:
                assert move.value in known
                strategies["last"] += move.value == last
        assert len(said) <= 4
        if len(plan) > 1:
            strategies["multi"] += 1
            strategies["right"] += tuple(said) == plan
            strategies["outer"] += tuple(said) == plan[::-1] != plan
            strategies["fewer"] += len(said) < len(plan)
    multi = strategies["multi"]
    assert abs(multi / 400 - 0.75) < 0.08
    assert 0.18 < strategies["right"] / multi < 0.36 and 0.30 < strategies["outer"] / multi < 0.52
    assert strategies["fewer"] / multi > 0.1 and 0.75 < strategies["last"] / 400 < 0.98


def test_entities_are_relabelled_per_sequence() -> None:
    """Each sequence has its own permutation: names of all splits occur alike and no fact survives."""
    world, facts, hits = TASK.library.world, 0, 0
    count = Counter[str]()
    for role in ("sub", "main"):
        for words, _ in batch(role, size=1500):
            count.update(w for w in words if w in ENTITIES)
    for words, _ in batch("sub", step=1, size=600):
        start = words.index("<doc>")
        title, document = words[start + 1], words[start + 2 : len(words) - 4]
        for relation, value in zip(document[::2], document[1::2], strict=False):
            if relation in RELATIONS:
                facts += 1
                hits += world.value(relation, title) == value
    assert facts > 1000 and hits / facts < 0.01
    frequency = np.array([count[e] for e in entities()])
    assert frequency.min() > 0 and frequency.max() < 3 * frequency.mean()
    heldout = [count[c] for c in world.countries["heldout"]]
    assert abs(np.mean(heldout) / frequency.mean() - 1) < 0.2


def test_equal_names_stay_equal() -> None:
    """Relabelling is one permutation: what was the same word in a sequence stays the same word."""
    for words, _ in batch("sub", size=100):
        entity = words[3]
        assert words[words.index("<search>") + 1] == entity
        found = words[words.index("<res>") + 1 :][:3]
        assert all(words[i + 1] in found for i, w in enumerate(words) if w in ("<open>", "<doc>"))


def test_batches_are_functions_of_their_arguments() -> None:
    """Same (role, step, size, seed): same batch from a fresh task; any other: another one."""

    def ids(task: AtlasTask, *arguments: int, role: str = "sub") -> list[list[int]]:
        return [t.tolist() for t, _ in task.demo_batch(role, *arguments)]

    first = ids(TASK, 5, 20, 1)
    assert ids(AtlasTask({}), 5, 20, 1) == first
    assert ids(TASK, 6, 20, 1) != first != ids(TASK, 5, 20, 2)
    lengths = [len(t) for t, _ in TASK.demo_batch("main", 0, 30, 0)]
    assert lengths == sorted(lengths) == [len(m) for _, m in TASK.demo_batch("main", 0, 30, 0)]
    for wrong in ({"role": "coder", "step": 0, "size": 1}, {"role": "sub", "step": -1, "size": 1}):
        with pytest.raises(ValueError, match=r"role|step"):
            TASK.demo_batch(**wrong, seed=0)  # type: ignore[arg-type]


def test_demos_have_the_form_of_play() -> None:
    """A demonstration's context is exactly what play() shows for the same turns (before relabelling)."""
    finding_agent = scripted("sub", gold_sub)
    conversation = Conversation(finding_agent, "q", 0, 0, 0)
    asyncio.run(play_sub(conversation, Call("country", "Tokyo"), TASK.library))
    played = [WORDS[t] for t in conversation.trajectory().tokens]

    def shape(words: list[str]) -> tuple[str, ...]:
        return tuple(w if w not in ENTITIES else "*" for w in words)

    assert shape(played) in {shape(words) for words, _ in batch("sub", size=1000)}
    agents = {"main": scripted("main", gold_main), "sub": scripted("sub", gold_sub)}
    rollout = asyncio.run(TASK.play(Question("phone of country of Suva", "+679"), Episode("q", 0, agents, 0)))
    main_shapes = {shape(words) for words, _ in batch("main", size=3000)}
    assert shape([WORDS[t] for t in rollout.main.tokens]) in main_shapes
