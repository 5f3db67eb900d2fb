"""Demonstrations for SFT: the skills are exact, the strategies are random.

Every sequence relabels all entity tokens by its own random permutation, so no fact can be memorised: a value can only
be copied from the context, and a held-out name is a token like any other. Only training countries occur in tasks.

sub    85 % a hop of a real chain, 15 % a mostly ill-posed task; the query is the entity, with the right section
       (.4) or any one where documents have sections; opens a uniformly random result, with .35 a second one where it
       may; answers from the last document: its field is the asked relation with .7, else uniform; where the asked
       relation is absent, `none` with .5; the value is an exact copy.
       (A second document that is always the right one was tried: RL then opens two for ever, the first one at
       random, and stays below .8 sampled.)
main   25 % the right chain, 15 % a truncated one, 40 % the outermost relation first, 20 % random calls;
       simulated results are wrong or `none` with .25; answers with the last result (.8), else uniformly with
       any entity seen.

Everything is drawn for a whole batch at once on a matrix with one column for each place a word can have; a
row's unused places are dropped at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgrpo.tasks.words.play import Library
from mgrpo.tasks.words.protocol import (
    ANSWER,
    CALL,
    CONTROL,
    DOCUMENT,
    GO,
    MAX_CALLS,
    NONE,
    OF,
    OPEN,
    QUESTION,
    RESULT,
    SEARCH,
    STOP,
    TASK,
)
from mgrpo.tasks.words.questions import Pools, plan_of, start_of
from mgrpo.tasks.words.world import World
from mgrpo.types import Int32, UInt8

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Demo = tuple[Int32, UInt8]

_SECOND = 0.35  # share of sub-agents that open a second document
_RIGHT_SECTION = 0.4  # share of queries for the section that tells the relation, and what chance adds
_STRATEGIES = (0.25, 0.15, 0.40, 0.20)  # right, truncated, outermost first, random
_RIGHT, _TRUNCATED, _OUTER_FIRST, _RANDOM = range(4)
_ABSENT = -1


class Demonstrations:
    """Draws batches of demonstrations; `chains` are the training questions by number of hops, which weigh as said
    for either role."""

    def __init__(
        self, library: Library, chains: Pools, main_weights: Sequence[float], sub_weights: Sequence[float]
    ) -> None:
        self._language = language = library.language
        self._id = language.ids
        self._relation0 = len(CONTROL)
        self._section0 = self._relation0 + len(language.relations) + len(language.fields)
        self._entity0 = self._section0 + len(language.sections)
        self._main_weights, self._sub_weights = main_weights, sub_weights
        self._none = self._id[NONE]
        self._facts = self._fact_table(library.world)
        self._questions = self._question_table(chains)
        self._sub_tasks = self._hop_table(library.world, chains)
        self._names = self._named(chains)
        self._corpus = _document_table(library)
        self._results = self._result_table(library)

    def batch(self, role: str, step: int, size: int, seed: int) -> list[Demo]:
        """`size` demonstrations of `role` for SFT step `step`, shortest first: a pure function of the
        arguments. A trainer that cuts the batch in this order pads little."""
        draw: dict[str, Callable[[np.random.Generator, int], _Sheet]] = {"main": self._main, "sub": self._sub}
        if role not in draw:
            raise ValueError(f"no demonstrations for role {role!r}; this task has main and sub")
        if step < 0 or size < 1:
            raise ValueError(f"step={step}, size={size}; expected step >= 0 and size >= 1")
        rng = np.random.default_rng((seed, step, len(role)))
        sheet = draw[role](rng, size)
        self._relabel(rng, sheet.words)
        return sorted(sheet.rows(), key=lambda demo: len(demo[0]))

    # -- the sub-agent --

    def _sub(self, rng: np.random.Generator, n: int) -> _Sheet:
        relation, entity = self._draw_tasks(rng, n)
        section, query = self._query(rng, relation, entity)
        results, titles = self._language.results, self._corpus.titles
        order = rng.permuted(np.tile(np.arange(results), (n, 1)), axis=1)
        found = self._results[entity, section]  # (n, results), numbers of documents
        rows = np.arange(n)
        first, second = found[rows, order[:, 0]], found[rows, order[:, 1]]
        twice = rng.random(n) < (_SECOND if self._language.max_opens > 1 else 0.0)
        field, value = self._read(rng, relation, np.where(twice, second, first))

        sheet = _Sheet(n)
        sheet.observe(self._word(TASK), relation, self._word(OF), entity, self._word(GO))
        sheet.act(self._word(SEARCH), *query, self._word(STOP))
        sheet.observe(self._word(RESULT), *titles[found].reshape(n, -1).T)
        sheet.act(self._word(OPEN), *titles[first].T, self._word(STOP))
        sheet.observe(self._word(DOCUMENT), *self._corpus.words[first].T)
        sheet.act(self._word(OPEN), *titles[second].T, self._word(STOP), where=twice)
        sheet.observe(self._word(DOCUMENT), *self._corpus.words[second].T, where=twice)
        sheet.act(self._word(ANSWER), field, value, self._word(STOP))
        return sheet

    def _query(self, rng: np.random.Generator, relation: Ids, entity: Ids) -> tuple[Ids, tuple[Ids, ...]]:
        """(number of the section, the query's words)."""
        sections = self._language.sections
        if not sections:
            return np.zeros_like(entity), (entity,)
        homes = np.array([sections.index(home) for home in self._language.homes], np.int32)
        anywhere = rng.integers(len(sections), size=len(entity))
        right = rng.random(len(entity)) < _RIGHT_SECTION
        section = np.where(right, homes[relation - self._relation0], anywhere).astype(np.int32)
        return section, (entity, section + np.int32(self._section0))

    def _draw_tasks(self, rng: np.random.Generator, n: int) -> tuple[Ids, Ids]:
        """(relation ids, entity ids) the sub-agent is asked about."""
        tasks, weights = self._sub_tasks
        relation, entity = tasks[rng.choice(len(tasks), size=n, p=weights)].T
        ill = rng.random(n) < 0.15
        any_relation = self._relation0 + rng.integers(len(self._language.relations), size=n)
        any_entity = self._names[rng.integers(len(self._names), size=n)]
        return (
            np.where(ill, any_relation, relation).astype(np.int32),
            np.where(ill, any_entity, entity).astype(np.int32),
        )

    def _read(self, rng: np.random.Generator, relation: Ids, document: Ids) -> tuple[Ids, Ids]:
        """(field ids, value ids) of answers from `document`: what stands there, or none."""
        corpus, rows = self._corpus, np.arange(len(document))
        slot = (rng.random(len(document)) * corpus.count[document]).astype(int)
        any_field = corpus.fields[document, slot]
        asked = rng.random(len(document)) < 0.7
        absent = corpus.values[document, relation - self._relation0] == _ABSENT
        say_none = asked & absent & (rng.random(len(document)) < 0.5)
        field = np.where(asked & ~absent | say_none, relation, any_field).astype(np.int32)
        value = corpus.values[document[rows], field - self._relation0]
        return field, np.where(say_none, self._none, value).astype(np.int32)

    # -- the main agent --

    def _main(self, rng: np.random.Generator, n: int) -> _Sheet:
        bank = self._questions
        hops = 1 + rng.choice(len(bank.counts), size=n, p=self._main_weights)
        pick = bank.starts[hops - 1] + (rng.random(n) * bank.counts[hops - 1]).astype(int)
        plan, calls, at_random = self._plans(rng, bank.plans[pick], hops)

        sheet = _Sheet(n)
        sheet.observe(self._word(QUESTION), *bank.words[pick].T, self._word(GO))
        # Entities the agent can name: the start, then the results.
        seen = np.full((n, MAX_CALLS + 1), _ABSENT, np.int32)
        seen[:, 0] = bank.entities[pick]
        known = np.ones(n, int)  # how many of them
        last = seen[:, 0].copy()
        result = last
        for i in range(MAX_CALLS):
            calling = i < calls
            entity = np.where(at_random, _pick(rng, seen, known), last)
            result_i = self._simulate(rng, plan[:, i], entity)
            sheet.act(self._word(CALL), plan[:, i], entity, self._word(STOP), where=calling)
            sheet.observe(self._word(RESULT), result_i, where=calling)
            result = np.where(calling, result_i, result)
            named = calling & (result_i != self._none)
            last = np.where(named, result_i, last)
            seen[named, known[named]] = result_i[named]
            known += named
        answer = np.where(rng.random(n) < 0.8, result, _pick(rng, seen, known))
        sheet.act(self._word(ANSWER), answer, self._word(STOP))
        return sheet

    def _plans(
        self, rng: np.random.Generator, right: Ids, hops: npt.NDArray[np.int64]
    ) -> tuple[Ids, npt.NDArray[np.int64], Flags]:
        """(relation ids (n, MAX_CALLS), number of calls, rows whose calls name random entities)."""
        n = len(right)
        strategy = rng.choice(len(_STRATEGIES), size=n, p=_STRATEGIES)
        at_random = strategy == _RANDOM
        plan = np.full((n, MAX_CALLS), self._relation0, np.int32)
        plan[:, : right.shape[1]] = right
        columns = np.arange(right.shape[1])
        back = np.clip(hops[:, None] - 1 - columns, 0, None)
        outer = np.take_along_axis(right, back, axis=1)
        plan[:, : right.shape[1]] = np.where(
            (strategy == _OUTER_FIRST)[:, None], outer, plan[:, : right.shape[1]]
        )
        # Random calls: half of the relations come from the question, half from anywhere.
        mentioned = np.take_along_axis(right, rng.integers(hops[:, None], size=(n, MAX_CALLS)), axis=1)
        anywhere = self._relation0 + rng.integers(len(self._language.relations), size=(n, MAX_CALLS))
        mixed = np.where(rng.random((n, MAX_CALLS)) < 0.5, mentioned, anywhere)
        plan = np.where(at_random[:, None], mixed, plan).astype(np.int32)
        calls = np.where(strategy == _TRUNCATED, rng.integers(hops), hops)
        calls = np.where(at_random, rng.integers(MAX_CALLS + 1, size=n), calls)
        return plan, calls.astype(np.int32), at_random

    def _simulate(self, rng: np.random.Generator, relation: Ids, entity: Ids) -> Ids:
        """What a sub-agent of middling quality might answer."""
        n = len(entity)
        truth = self._facts[relation - self._relation0, entity]
        wrong = self._names[rng.integers(len(self._names), size=n)]
        guess = np.where(rng.random(n) < 0.5, self._none, wrong)
        return np.where((rng.random(n) < 0.25) | (truth == _ABSENT), guess, truth).astype(np.int32)

    # -- tables --

    def _word(self, word: str) -> int:
        return self._id[word]

    def _relabel(self, rng: np.random.Generator, words: Ids) -> None:
        count = len(self._language.entities)
        permutations = rng.permuted(np.tile(np.arange(count, dtype=np.int32), (len(words), 1)), axis=1)
        rows, columns = np.nonzero(words >= self._entity0)
        words[rows, columns] = self._entity0 + permutations[rows, words[rows, columns] - self._entity0]

    def _fact_table(self, world: World) -> Ids:
        table = np.full((len(self._language.relations), len(self._id)), _ABSENT, np.int32)
        for (relation, entity), value in world.facts.items():
            table[self._id[relation] - self._relation0, self._id[entity]] = self._id[value]
        return table

    def _question_table(self, chains: Pools) -> _QuestionTable:
        questions = [q for pool in chains for q in pool]
        width = max(len(q.text.split()) for q in questions)
        counts = np.array([len(pool) for pool in chains])
        table = _QuestionTable(
            words=np.full((len(questions), width), _ABSENT, np.int32),
            plans=np.full((len(questions), len(chains)), self._relation0, np.int32),
            entities=np.array([self._id[start_of(q)] for q in questions], np.int32),
            starts=np.cumsum(counts) - counts,
            counts=counts,
        )
        for i, question in enumerate(questions):
            words = question.text.split()
            table.words[i, : len(words)] = [self._id[w] for w in words]
            plan = plan_of(question)
            table.plans[i, : len(plan)] = [self._id[r] for r in plan]
        return table

    def _hop_table(self, world: World, chains: Pools) -> tuple[Ids, npt.NDArray[np.float64]]:
        """((relation, entity) ids of every hop of every chain, how often the chains ask it)."""
        weight: dict[tuple[int, int], float] = {}
        for pool, share in zip(chains, self._sub_weights, strict=True):
            for question in pool:
                entity, plan = start_of(question), plan_of(question)
                for relation, value in zip(plan, world.follow(entity, plan) or (), strict=True):
                    key = self._id[relation], self._id[entity]
                    weight[key] = weight.get(key, 0.0) + share / len(pool)
                    entity = value
        weights = np.array(list(weight.values()))
        return np.array(list(weight), np.int32), weights / weights.sum()

    def _named(self, chains: Pools) -> Ids:
        """Every entity the training questions start from, lead through or lead to."""
        names = {self._id[q.answer] for pool in chains for q in pool}
        return np.array(sorted(names | {int(i) for i in self._sub_tasks[0][:, 1]}), np.int32)

    def _result_table(self, library: Library) -> npt.NDArray[np.int64]:
        """(token ids, sections, results): the numbers of the documents that a search for a name finds."""
        words, sections = self._language.vocabulary, self._language.sections
        number = {title: i for i, title in enumerate(library.documents)}
        shape = len(words), len(sections) or 1, self._language.results
        table = np.full(shape, _ABSENT, np.int64)
        for i in self._names:
            queries = [f"{words[i]} {section}" for section in sections] or [words[i]]
            for place, query in enumerate(queries):
                table[i, place] = [number[title] for title in library.index.search(query)]
        return table


def _document_table(library: Library) -> _Corpus:
    language, documents = library.language, tuple(library.documents.values())
    size, width = len(documents), max(len(d.fields) for d in documents)
    title_words = 2 if language.sections else 1
    relation0 = len(CONTROL)
    corpus = _Corpus(
        titles=np.full((size, title_words), _ABSENT, np.int32),
        words=np.full((size, title_words + 2 * width), _ABSENT, np.int32),
        fields=np.full((size, width), _ABSENT, np.int32),
        values=np.full((size, len(language.relations) + len(language.fields)), _ABSENT, np.int32),
        count=np.zeros(size, np.int64),
    )
    for i, document in enumerate(documents):
        words = [language.ids[w] for w in document.text.split()]
        corpus.titles[i] = words[:title_words]
        corpus.words[i, : len(words)] = words
        corpus.count[i] = len(document.fields)
        for slot, (relation, value) in enumerate(document.fields):
            corpus.fields[i, slot] = language.ids[relation]
            corpus.values[i, language.ids[relation] - relation0] = language.ids[value]
    return corpus


@dataclass(frozen=True, slots=True)
class _QuestionTable:
    """Questions as token ids, those with fewer hops first; starts[h - 1], counts[h - 1]: where h hops lie."""

    words: Ids
    plans: Ids
    entities: Ids
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Corpus:
    """Documents by number: words of the title, all words, field ids by slot, value ids by field, field count."""

    titles: Ids
    words: Ids
    fields: Ids
    values: Ids
    count: npt.NDArray[np.int64]


class _Sheet:
    """n sequences side by side, written column by column; places a sequence does not use hold _ABSENT."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._columns: list[Ids] = []
        self._sampled: list[bool] = []
        self._matrix: Ids | None = None

    def observe(self, *words: Ids | int, where: Flags | None = None) -> None:
        """Context: not trained on."""
        self._write(words, False, where)

    def act(self, *words: Ids | int, where: Flags | None = None) -> None:
        """A turn of the agent: trained on."""
        self._write(words, True, where)

    def _write(self, words: tuple[Ids | int, ...], sampled: bool, where: Flags | None) -> None:
        for word in words:
            column = np.broadcast_to(np.asarray(word, np.int32), (self._n,))
            self._columns.append(column if where is None else np.where(where, column, _ABSENT))
            self._sampled.append(sampled)

    @property
    def words(self) -> Ids:
        """(n, places), writable once all columns are written."""
        if self._matrix is None:
            self._matrix = np.stack(self._columns, axis=1).astype(np.int32)
        return self._matrix

    def rows(self) -> list[Demo]:
        used = self.words != _ABSENT
        mask = np.array(self._sampled, np.uint8)
        return [(row[keep], mask[keep]) for row, keep in zip(self.words, used, strict=True)]


def _pick(rng: np.random.Generator, seen: Ids, known: npt.NDArray[np.int64]) -> Ids:
    """One of the first known[i] entries of each row, uniformly."""
    column = (rng.random(len(seen)) * known).astype(int)
    return np.take_along_axis(seen, column[:, None], axis=1)[:, 0]
