"""What a task must offer a run. The pipeline knows tasks only through this interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

from mgrpo.environments.comparison import Claim, Figures
from mgrpo.environments.episode import Agent, Episode
from mgrpo.model.chat_check import ChatUse
from mgrpo.types import Int32, Rollout, UInt8

Split = Literal["train", "validation", "heldout"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its gold answer. `info` is for people and for the task's own scoring."""

    text: str
    answer: str
    info: Mapping[str, object] = field(default_factory=dict)
    id: str = ""
    """Names it in its set, the same in every run; empty: it has none."""
    answers: tuple[str, ...] = ()
    """All gold answers, any of which is right; empty: `answer` alone."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What results are reported by, e.g. {"level": "2"}."""
    attachments: tuple[str, ...] = ()
    """Paths of files that belong to it."""
    secret: bool = False
    """Of a benchmark that must not be published: no record may hold its text, its answer or what agents write of it."""

    @property
    def gold(self) -> tuple[str, ...]:
        """Every answer that is right."""
        return self.answers or (self.answer,)


class QuestionSource(Protocol):
    """Where a task's questions come from: pure functions of their arguments, as Task.question and Task.questions."""

    def question(self, index: int, seed: int) -> Question: ...

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]: ...


@dataclass(frozen=True, slots=True)
class StartReport:
    """Whether the policies that RL starts from are a valid start. figures: name -> (value, low, high); valid iff all
    are inside."""

    figures: Mapping[str, tuple[float, float, float]]

    @property
    def valid(self) -> bool:
        return all(low <= value <= high for value, low, high in self.figures.values())

    def __str__(self) -> str:
        if not self.figures:
            return "the task accepts any start"
        return ", ".join(
            f"{name} {value:.3f} ({'ok' if low <= value <= high else f'outside {low:g}..{high:g}'})"
            for name, (value, low, high) in self.figures.items()
        )


class Task(ABC):
    """Questions, tools and scoring. Everything is a pure function of its arguments; nothing reads a clock."""

    roles: tuple[str, ...]
    """All roles, "main" first."""
    chat = False
    """Whether its agents converse through their models' chat templates; a model without one is then refused."""
    chat_use = ChatUse()
    """What the templates must carry: tried before a run starts, so that a model whose template cannot is refused by
    name."""
    scores: Mapping[str, frozenset[str]] = MappingProxyType({})
    """Role -> names of the scores with which play() closes its conversations, e.g. {"main": frozenset({"format"})}.
    What is declared is compared with agents.<role>.reward before a run starts, what is not at its first rollout."""

    controls: Mapping[str, Mapping[str, object]] = MappingProxyType({})
    """For `mgrpo compare`: name of a control -> task options under which co-training's policies are scored as well."""

    evaluation_sets: tuple[str, ...] = ()
    """Names of the sets that evaluation_set() gives, for [[eval.sets]] with source = "task"."""

    def __init__(
        self, options: Mapping[str, object] = MappingProxyType({}), roles: Sequence[str] | None = None
    ) -> None:
        """options: the run's [task.options]; roles: the run's, "main" first (None: those of the class). The default
        takes no options and the roles of the class. Raises ValueError for what the task cannot serve."""
        if options:
            raise ValueError(f"options {sorted(options)} given, expected none")
        if roles is not None and set(roles) != set(self.roles):
            raise ValueError(f"roles {list(roles)} given, expected {list(self.roles)}")

    @abstractmethod
    def question(self, index: int, seed: int) -> Question:
        """Training question number `index` of the endless stream of `seed`."""

    @abstractmethod
    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        """n fixed questions of a split, the same for every policy."""

    def evaluation_set(self, name: str, n: int | None = None) -> Sequence[Question]:
        """The first n questions (None: all) of one of `evaluation_sets`: fixed, and never trained on."""
        raise NotImplementedError(f"{type(self).__name__} has no evaluation set {name!r}")

    @abstractmethod
    async def play(self, question: Question, episode: Episode) -> Rollout:
        """Run one rollout to its end: the agents talk, tools answer, conversations are closed with their scores.
        Returns what episode.finish() returned.

        Every trajectory of a role has the same scores; an invalid one (`format` 0) that the gate pays nothing need not
        be judged. Tools and judges over a network are called through episode.tool(), which tries a lost call again.
        Raises InfrastructureError where an engine, tool or judge does not answer, never scores 0: the rollout is played
        again. Any other exception fails this rollout, which is counted and never scored 0. asyncio
        tasks that it starts end with it: what still runs when it returns or raises is cancelled and awaited.
        """

    def single_agent(self, options: Mapping[str, object]) -> Mapping[str, object] | None:
        """[task.options], or those of a stage, for "main" alone with every tool of the team whose options are given:
        the variant "single" of `mgrpo compare`. None: there is no such agent; the default."""
        return None

    # -- policies that start from scratch (a task over pretrained models need not override the rest) --

    def build_policy(self, role: str, seed: int, path: str) -> None:
        """Write a fresh policy of `role` (model and tokenizer, Hugging Face layout) to the folder `path`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no built-in policy; set agents.{role}.model to a path"
        )

    def demo_batch(self, role: str, step: int, size: int, seed: int) -> Sequence[tuple[Int32, UInt8]]:
        """Demonstrations for SFT: (tokens i32[L], loss_mask u8[L]) of `size` sequences."""
        raise NotImplementedError(f"{type(self).__name__} has no demonstrations")

    def sft_lr(self, role: str) -> float:
        """Highest learning rate of the SFT of a built-in policy, where the config leaves it open."""
        return 1e-3

    async def validate_start(self, agents: Mapping[str, Agent], n: int, seed: int) -> StartReport:
        """Validate the policies that RL starts from on n questions (eval.start_validation); the default accepts any."""
        return StartReport({})

    async def preflight(self) -> None:  # noqa: B027
        """Called once, before the first step of a run (a resumed one too), on the loop that plays: ask the services
        that the task needs, calibrate its judge. Raises ConfigError for what the run could not work with."""

    async def close(self) -> None:  # noqa: B027
        """Called when the worker ends, on the loop that played: close connections, end processes. Idempotent."""

    def digests(self) -> Mapping[str, str]:
        """What an outcome depends on beside questions and policies, by name: scorer, judge, prompt, corpus. A
        benchmark's report carries them, so that two reports can be compared. The default: nothing."""
        return {}

    def claims(self, figures: Figures) -> Sequence[Claim]:
        """What `mgrpo compare` must show, each claim beside what was measured; the default claims nothing."""
        return ()
