"""From what a harness says of its rollout to the scores that its conversations are closed with.

    posted while it ran  <  said with the answer  <  returned by score()      the later wins, name by name
    of a whole role      <  of one invocation                                 within each of the three

Every trajectory of a role is closed with the same names: those that the task declares. A name that is missing, and one
that nobody declared, fail the rollout by name; nothing is scored 0 in their place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgrpo.environments.conversation import unit_score
from mgrpo.errors import RolloutError

Place = tuple[str, int]
"""(role, invocation)."""
Scores = Mapping[Any, Mapping[str, float]]
"""Role, or (role, invocation) -> name of a score -> a number in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Score:
    """What score() makes of an answer. correct: the rollout's outcome, 0..1; scores: of its trajectories."""

    correct: float
    scores: Scores = field(default_factory=dict)
    info: Mapping[str, object] = field(default_factory=dict)
    """Further parts of the rollout's record, for people."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What run() may return in place of a plain answer: value, with what the harness itself says of it. correct: the
    outcome, for options.score.rule "reported" alone: anywhere else it would be overruled, and fails the rollout."""

    value: object
    correct: float | None = None
    scores: Scores = field(default_factory=dict)


def read_answer(body: Mapping[str, object], where: str) -> Answer:
    """From JSON: {"answer": any value, "correct": 0..1, "scores": {role: {name: number} or [{...} of each
    invocation]}}, the last two where they are given. Raises RolloutError naming `where` and the field."""
    unknown = sorted(set(body) - {"answer", "correct", "scores"})
    if unknown or "answer" not in body:
        what = f"has no field {unknown[0]!r}" if unknown else "needs the field 'answer'"
        raise RolloutError(f"the answer of {where} {what}: expected answer, and correct and scores if any")
    correct = body.get("correct")
    number = None if correct is None else unit_score(correct, f"correct of {where}")
    return Answer(body["answer"], number, _read_scores(body.get("scores"), where))


def _read_scores(given: object, where: str) -> Scores:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RolloutError(f"scores of {where} are {given!r:.100}, expected a table of roles")
    found: dict[str | Place, Mapping[str, float]] = {}
    for role, of_role in given.items():
        if isinstance(of_role, Mapping):
            found[str(role)] = _numbers(of_role, f"{role!r} of {where}")
        elif isinstance(of_role, list):
            for number, of_one in enumerate(of_role):
                found[str(role), number] = _numbers(of_one, f"{role!r}, invocation {number}, of {where}")
        else:
            raise RolloutError(
                f"scores of {role!r} of {where} are {of_role!r:.100}, expected a table or a list"
            )
    return found


def _numbers(given: object, what: str) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise RolloutError(f"scores of {what} are {given!r:.100}, expected a table of numbers")
    return {str(name): unit_score(value, f"score {name!r} of {what}") for name, value in given.items()}


def merged_scores(
    places: Collection[Place], declared: Mapping[str, Collection[str]], *sources: Scores
) -> dict[Place, dict[str, float]]:
    """The scores of each of `places`: sources from the weakest to the strongest. declared: role -> the names that its
    trajectories have. Raises RolloutError for scores of a role or invocation that is not there, for a name that is
    missing or not declared, and for what is no number in [0, 1]."""
    found: dict[Place, dict[str, float]] = {place: {} for place in places}
    for source in sources:
        for place in _in_order(source):
            named = source[place]
            for at in _places_of(place, places, declared):
                found[at].update({str(name): named[name] for name in named})
    for (role, invocation), scores in found.items():
        wanted, what = set(declared.get(role, ())), f"invocation {invocation} of role {role!r}"
        if missing := sorted(wanted - set(scores)):
            raise RolloutError(
                f"{what} has no score {', '.join(map(repr, missing))}, which its task declares: return it from "
                "score(), say it with the answer, or post it before the rollout ends"
            )
        if unknown := sorted(set(scores) - wanted):
            raise RolloutError(
                f"{what} has a score {', '.join(map(repr, unknown))} that its task does not declare; declared for "
                f"{role!r}: {', '.join(sorted(wanted)) or 'none'} (`scores` of the class or of task.options)"
            )
        for name, value in scores.items():
            scores[name] = unit_score(value, f"score {name!r} of {what}")
    return found


def _in_order(source: Scores) -> Sequence[str | Place]:
    """Those of whole roles first."""
    return sorted(source, key=lambda place: not isinstance(place, str))


def _places_of(
    place: str | Place, places: Collection[Place], declared: Mapping[str, Collection[str]]
) -> list[Place]:
    if isinstance(place, str):
        if place not in declared:
            raise RolloutError(f"scores for an unknown role {place!r}; this run has {sorted(declared)}")
        return [at for at in places if at[0] == place]
    if place not in places:
        raise RolloutError(f"scores for {place!r:.100}, which is no invocation of this rollout")
    return [place]
