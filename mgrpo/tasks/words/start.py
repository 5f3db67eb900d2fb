"""Are the policies after SFT a valid start? The skills must be there, the strategy must not.

main_copy      the main agent alone, greedy: its turns are well formed and every name in them is copied from
               what it saw
sub_copy       the sub-agent alone, greedy: it searches for the entity and answers exactly what the document
               says
main_two_hops  the main agent with an oracle as its sub-agent, sampled: how often it solves a 2-hop question.
               Too low and RL finds nothing to reinforce; too high and the plan is already known.
joint_sampled, joint_greedy   accuracy of the team before RL; more would mean that RL only sharpens.

All on the validation split. An agent alone is measured by the first and the third.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mgrpo.environments.episode import Agent, Conversation, Episode, mix
from mgrpo.environments.task import Question, StartReport
from mgrpo.tasks.words.play import Finding, Library, MainTrace, play, play_main, play_sub
from mgrpo.tasks.words.protocol import Call
from mgrpo.tasks.words.questions import QuestionBank, plan_of, start_of

BOUNDS = {
    "main_copy": (0.97, 1.0),
    "sub_copy": (0.97, 1.0),
    "main_two_hops": (0.10, 0.30),
    "joint_sampled": (0.0, 0.25),
    "joint_greedy": (0.0, 0.40),
}
"""name -> (low, high)"""


async def validate_start(
    library: Library,
    bank: QuestionBank,
    agents: Mapping[str, Agent],
    n: int,
    seed: int,
    bounds: Mapping[str, tuple[float, float]] = BOUNDS,
) -> StartReport:
    """Measure the figures of BOUNDS on n validation questions; `bounds` in the place of its bounds."""
    return await _Validation(library, bank, agents, seed).report(n, bounds)


@dataclass(frozen=True, slots=True)
class _Validation:
    library: Library
    bank: QuestionBank
    agents: Mapping[str, Agent]
    seed: int

    async def report(self, n: int, bounds: Mapping[str, tuple[float, float]]) -> StartReport:
        questions = self.bank.fixed("validation", n, self.seed)
        # Each twice, and as many questions as there are: the lower bound is close to what a good start has.
        two_hops = 2 * self.bank.with_hops("validation", 2, 2 * n, self.seed)
        alone = await self._mains(questions, temperature=0.0)
        solved = await self._mains(two_hops, temperature=1.0)
        figures = {
            "main_copy": _mean([_copies(t, q) for t, q in zip(alone, questions, strict=True)]),
            "main_two_hops": _mean([t.answer == q.answer for t, q in zip(solved, two_hops, strict=True)]),
        }
        if "sub" in self.agents:
            findings = await self._subs([c for q in questions for c in self._hops(q)][:n])
            figures |= {
                "sub_copy": _mean([f.copied and _searched(f) for f in findings]),
                "joint_sampled": await self._team(questions, temperature=1.0),
                "joint_greedy": await self._team(questions, temperature=0.0),
            }
        return StartReport(
            {name: (figures[name], *bound) for name, bound in bounds.items() if name in figures}
        )

    async def _mains(self, questions: Sequence[Question], temperature: float) -> list[MainTrace]:
        """The main agent with a sub-agent that knows the corpus by heart."""

        async def oracle(call: Call) -> str:
            return self.library.value(call)

        async def one(i: int, question: Question) -> MainTrace:
            main = self._conversation("main", f"start/main/{temperature}/{i}", i, temperature)
            trace = await play_main(main, question, oracle, self.library)
            main.close()
            return trace

        return await asyncio.gather(*(one(i, q) for i, q in enumerate(questions)))

    async def _subs(self, calls: Sequence[Call]) -> list[Finding]:
        async def one(i: int, call: Call) -> Finding:
            return await play_sub(self._conversation("sub", f"start/sub/{i}", i, 0.0), call, self.library)

        return await asyncio.gather(*(one(i, c) for i, c in enumerate(calls)))

    async def _team(self, questions: Sequence[Question], temperature: float) -> float:
        agents = {role: replace(a, temperature=temperature) for role, a in self.agents.items()}

        async def one(i: int, question: Question) -> bool:
            episode = Episode(f"start/team/{temperature}/{i}", 0, agents, mix(self.seed, i))
            trace, _ = await play(question, episode, self.library)
            return trace.answer == question.answer

        return _mean(await asyncio.gather(*(one(i, q) for i, q in enumerate(questions))))

    def _conversation(self, role: str, name: str, i: int, temperature: float) -> Conversation:
        agent = replace(self.agents[role], temperature=temperature)
        return Conversation(agent, name, 0, 0, mix(self.seed, i))

    def _hops(self, question: Question) -> list[Call]:
        """The calls that solve a question."""
        start, plan = start_of(question), plan_of(question)
        values = self.library.world.follow(start, plan) or []
        return [Call(r, e) for r, e in zip(plan, [start, *values], strict=False)]


def _searched(finding: Finding) -> bool:
    """Whether the query was for the entity that was asked about."""
    return finding.query is not None and finding.query.split()[0] == finding.call.entity


def _copies(trace: MainTrace, question: Question) -> bool:
    """Every name the main agent said had been shown to it before."""
    seen = {start_of(question)}
    for call, value in trace.calls:
        if call.entity not in seen:
            return False
        seen.add(value)
    return trace.answer in seen


def _mean(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes)
