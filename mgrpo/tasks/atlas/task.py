"""The embedded default task "atlas": multi-hop questions about countries for a planner and a searcher.

The main agent takes a question apart and delegates single hops; the sub-agent searches, opens documents and
answers. Neither can do without the other: the plan is the main agent's alone, the documents are seen by the
sub-agent alone. In a run of agents.main alone, a tool answers its calls without fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mgrpo.environments.comparison import Claim, Figures
from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.task import Question, Split, StartReport, Task
from mgrpo.tasks.atlas.claims import CONTROLS, claims
from mgrpo.tasks.atlas.demos import Demonstrations
from mgrpo.tasks.atlas.documents import build_documents
from mgrpo.tasks.atlas.facts import FactsMode, World
from mgrpo.tasks.atlas.play import SCORES, Library, play
from mgrpo.tasks.atlas.policy import build_policy, sft_lr
from mgrpo.tasks.atlas.protocol import TURN_WORDS
from mgrpo.tasks.atlas.questions import QuestionBank
from mgrpo.tasks.atlas.search import Index, SearchMode
from mgrpo.tasks.atlas.start import validate_start
from mgrpo.types import Int32, Rollout, UInt8


class AtlasOptions(BaseModel):
    """[task.options] of the task atlas."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: SearchMode = "bm25"
    """"random" answers every search with arbitrary documents: a control in which nothing can be known."""

    facts: FactsMode = "real"
    """"permuted": the documents tell of a world with values dealt anew, a control for memorised facts. Answers follow
    the documents; `info["real_answer"]` of a question is what the real world says."""

    turn_tokens: int = Field(default=TURN_WORDS, ge=TURN_WORDS)
    """Most tokens of one turn. The built-in tokenizer needs 4; a pretrained one splits names into several."""

    width: int = Field(default=64, ge=8, multiple_of=8)
    """Hidden size of a fresh policy, which has 8 heads."""


class AtlasTask(Task):
    """See the module's docstring. Scores: main and sub `format`, sub `expert`; correct is exact match."""

    roles: tuple[str, ...] = ("main", "sub")
    scores = SCORES
    controls = CONTROLS

    def __init__(self, options: Mapping[str, object], roles: Sequence[str] = roles) -> None:
        if set(roles) not in ({"main"}, {"main", "sub"}):
            raise ValueError(f"roles {list(roles)} given, expected main and sub, or main alone")
        self.roles = tuple(roles)
        try:
            self.options = AtlasOptions.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"options.{field}: {first['msg']}, got {first['input']!r}") from None
        world = World(self.options.facts)
        documents = build_documents(world)
        index = Index(documents.values(), self.options.search)
        self.library = Library(world, documents, index, self.options.turn_tokens)
        self.bank = QuestionBank(world)
        self._demos: Demonstrations | None = None

    def question(self, index: int, seed: int) -> Question:
        return self.bank.draw(index, seed)

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        """In the exact hop mix 1 : 2 : 1. ValueError when the split has no n distinct ones."""
        return self.bank.fixed(split, n, seed)

    async def play(self, question: Question, episode: Episode) -> Rollout:
        trace, findings = await play(question, episode, self.library)
        calls = [{"relation": c.relation, "entity": c.entity, "result": value} for c, value in trace.calls]
        return episode.finish(
            float(trace.answer == question.answer),
            answer=trace.answer,
            gold=question.answer,
            real_answer=question.info.get("real_answer"),
            calls=calls,
            opened=[list(f.opened) for f in findings],
        )

    def build_policy(self, role: str, seed: int, path: str) -> None:
        if role not in self.roles:
            raise ValueError(f"unknown role {role!r}; this task has {list(self.roles)}")
        build_policy(seed, path, self.options.width)

    def demo_batch(self, role: str, step: int, size: int, seed: int) -> Sequence[tuple[Int32, UInt8]]:
        """In the token ids of the built-in tokenizer."""
        if self._demos is None:
            self._demos = Demonstrations(self.library, self.bank.chains("train"))
        return self._demos.batch(role, step, size, seed)

    def sft_lr(self, role: str) -> float:
        """4e-3 at width 64, and less the wider: see policy.py."""
        return sft_lr(self.options.width)

    async def validate_start(self, agents: Mapping[str, Agent], n: int, seed: int) -> StartReport:
        return await validate_start(self.library, self.bank, agents, n, seed)

    def claims(self, figures: Figures) -> Sequence[Claim]:
        return claims(figures)
