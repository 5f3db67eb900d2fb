"""A multi-hop question task for a planner and a searcher that share a closed vocabulary; tasks give it a world.

The main agent takes a question apart and delegates single hops; the sub-agent searches, opens documents and
answers. Neither can do without the other: the plan is the main agent's alone, the documents are seen by the
sub-agent alone. In a run of agents.main alone, a tool answers its calls without fail.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mgrpo.config.settings import first_problem
from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.task import Question, Split, StartReport, Task
from mgrpo.tasks.words.claims import CONTROLS
from mgrpo.tasks.words.demos import Demonstrations
from mgrpo.tasks.words.play import SCORES, Library, play
from mgrpo.tasks.words.policy import build_policy, sft_lr
from mgrpo.tasks.words.protocol import TURN_WORDS
from mgrpo.tasks.words.questions import QuestionBank
from mgrpo.tasks.words.search import SearchMode
from mgrpo.tasks.words.start import BOUNDS, validate_start
from mgrpo.tasks.words.world import FactsMode
from mgrpo.types import Int32, Rollout, UInt8


class WordsOptions(BaseModel):
    """[task.options] of such a task."""

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


class WordsTask(Task):
    """See the module's docstring. Scores: main and sub `format`, sub `expert`; correct is exact match."""

    roles: tuple[str, ...] = ("main", "sub")
    scores = SCORES
    controls = CONTROLS
    positions = 128
    """Tokens of the longest trajectory of a fresh policy."""
    bounds: Mapping[str, tuple[float, float]] = BOUNDS
    """Of the start validation."""
    main_weights: tuple[float, ...]
    """Of questions with 1, 2 and 3 relations among the main agent's demonstrations."""
    sub_weights: tuple[float, ...]
    """Likewise among the sub-agent's."""

    def __init__(self, options: Mapping[str, object], roles: Sequence[str] = roles) -> None:
        if set(roles) not in ({"main"}, {"main", "sub"}):
            raise ValueError(f"roles {list(roles)} given, expected main and sub, or main alone")
        self.roles = tuple(roles)
        try:
            self.options = WordsOptions.model_validate(dict(options))
        except ValidationError as error:
            raise ValueError(first_problem(error, "options")) from None
        self.library, self.bank = self.make_world()
        self._demos: Demonstrations | None = None

    @abstractmethod
    def make_world(self) -> tuple[Library, QuestionBank]:
        """What the options say the tools know and what is asked."""

    def question(self, index: int, seed: int) -> Question:
        return self.bank.draw(index, seed)

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        """In the exact hop mix. ValueError when the split has no n distinct ones."""
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
        build_policy(seed, path, self.options.width, self.library.language.vocabulary, self.positions)

    def demo_batch(self, role: str, step: int, size: int, seed: int) -> Sequence[tuple[Int32, UInt8]]:
        """In the token ids of the built-in tokenizer."""
        if self._demos is None:
            chains = self.bank.chains("train")
            self._demos = Demonstrations(self.library, chains, self.main_weights, self.sub_weights)
        return self._demos.batch(role, step, size, seed)

    def sft_lr(self, role: str) -> float:
        """4e-3 at width 64, and less the wider: see policy.py."""
        return sft_lr(self.options.width)

    async def validate_start(self, agents: Mapping[str, Agent], n: int, seed: int) -> StartReport:
        return await validate_start(self.library, self.bank, agents, n, seed, self.bounds)
