"""One agent's side of a rollout: turns and results within its number of turns and its length.

Room is kept for an answer at all times. A turn of `turn_tokens` is taken only where behind it the words "give your
answer now" and `answer_tokens` still fit. Where they would not, and before the last turn that is allowed, the agent
reads these words behind its results, which are cut to what fits, and takes its answer turn. So an agent that
searches until nothing fits any more is asked for its answer, and no trajectory outgrows max_length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mgrpo.engines.base import SamplingParams
from mgrpo.environments.episode import Conversation
from mgrpo.errors import ContextOverflowError
from mgrpo.model.chat import ChatFormat, Message
from mgrpo.tasks.research.options import LimitOptions
from mgrpo.tasks.research.prompts import CUT, NOTHING, NOW
from mgrpo.tools.base import Observation
from mgrpo.tools.calls import Format, Turn, parse

SHORTEST = 32
"""Characters below which a result is not cut any further, but left out."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How the agents of a role speak. final: the tool that ends its work. observed: the role of results in the chat.
    schemas: of its tools, for templates that describe them."""

    form: Format
    final: str
    limits: LimitOptions
    observed: str = "user"
    schemas: Sequence[Mapping[str, object]] | None = None


class Start:
    """How a conversation begins: its first messages in token ids, and what must stay free behind every turn."""

    def __init__(self, form: ChatFormat, manner: Manner, messages: Sequence[Message]) -> None:
        """Raises ChatError for messages that the chat template cannot carry."""
        self.form, self.manner = form, manner
        self.opening = form.open(messages, manner.schemas)
        words = f"{CUT}\n\n{NOW[manner.final]}"
        last = form.observe(manner.observed, words, ended=False, opening=self.opening)
        self.reserve = len(last) + manner.limits.answer_tokens
        """Tokens of the words before an answer turn, and of that turn."""

    @property
    def least(self) -> int:
        """Tokens of a trajectory with one turn and an answer turn."""
        return len(self.opening.ids) + self.manner.limits.turn_tokens + self.reserve


class Talk:
    """One conversation. turns: those taken. well_formed: those that counted as such. forced: the last was an answer
    turn. cut: results that were not shown whole."""

    def __init__(self, conversation: Conversation, start: Start) -> None:
        """Raises ContextOverflowError where the first messages leave no room for two turns."""
        agent = conversation.agent
        if start.least > conversation.remaining:
            raise ContextOverflowError(
                f"the first messages of role {agent.role!r} take {len(start.opening.ids)} tokens, which with its turns "
                f"makes {start.least}; agents.{agent.role}.max_length is {agent.max_length}"
            )
        self.turns = self.well_formed = self.cut = 0
        self.forced = False
        self._conversation, self._start = conversation, start
        self._manner, self._limits = start.manner, start.manner.limits
        self._results: list[str] = []

    async def turn(self) -> Turn | None:
        """What the agent does next; None where it has had its answer turn, or nothing fits any more."""
        if self.forced:
            return None
        ids, tokens = self._next()
        if not ids:
            return None
        conversation, form = self._conversation, self._start.form
        conversation.append_ids(ids)
        params = SamplingParams(tokens, conversation.agent.temperature, form.stop_ids)
        said = parse(self._manner.form, form.text(await conversation.sample_ids(params)))
        self.turns += 1
        return said

    def observe(self, results: Sequence[tuple[str, Observation]]) -> None:
        """What the agent reads before its next turn: the results of its calls (tool, observation), in their order."""
        self._results = [self._result(name, seen) for name, seen in results]

    def grade(self, well_formed: bool) -> None:
        """Of the turn that was taken last."""
        self.well_formed += well_formed

    def format(self, answered: bool, *, strict: bool) -> float:
        """The trajectory's format score: see ScoreOptions.format."""
        if not answered:
            return 0.0
        return float(self.well_formed == self.turns) if strict else self.well_formed / self.turns

    def shown(self, text: str) -> str:
        """A result as far as the agent can read it."""
        return shortened(text, self._limits.observation_chars)

    # -- before a turn --

    def _next(self) -> tuple[list[int], int]:
        """(ids before the next turn, its most tokens); no ids where none would fit."""
        limits, room = self._limits, self._conversation.remaining
        if not self.turns:
            return self._start.opening.ids, limits.turn_tokens
        reserve = self._start.reserve
        if self.turns + 1 < limits.turns:
            ids, cut = self._fitted("", limits.observation_tokens)
            if ids and len(ids) + limits.turn_tokens + reserve <= room:
                self.cut += cut
                return ids, limits.turn_tokens
        self.forced = True
        most = min(room - limits.answer_tokens, limits.observation_tokens + reserve)
        ids, cut = self._fitted(NOW[self._manner.final], most)
        self.cut += cut
        return ids, min(limits.turn_tokens, room - len(ids))

    def _fitted(self, end: str, most: int) -> tuple[list[int], int]:
        """The results and the words `end` behind them in at most `most` tokens, cut where they must be, and how many
        were; no ids where not even `end` fits."""
        longest = max(map(len, self._results))
        while True:
            texts = [shortened(text, longest) for text in self._results]
            ids = self._ids(self._messages(texts, end))
            if len(ids) <= most:
                return ids, sum(a != b for a, b in zip(texts, self._results, strict=True))
            longest = int(longest * min(0.9, max(0, most) / len(ids)))
            if longest < SHORTEST:
                break
        message = {"role": self._manner.observed, "content": f"{CUT}\n\n{end}".strip()}
        ids = self._ids([message])
        return (ids if len(ids) <= most else []), len(self._results)

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        """Of what the agent reads behind its last turn."""
        start, last = self._start, self._conversation.last_sampled()
        return start.form.extend(messages, last=last, opening=start.opening)

    def _messages(self, texts: Sequence[str], end: str) -> list[Message]:
        texts = [*texts[:-1], f"{texts[-1]}\n\n{end}"] if end else texts
        if self._manner.observed == "user":
            texts = ["\n\n".join(texts)]
        return [{"role": self._manner.observed, "content": text} for text in texts]

    def _result(self, name: str, seen: Observation) -> str:
        """One result as the agent reads it. A tool role's message stands for its call; the user's says whose it is."""
        text = self.shown(seen.text.strip()) or NOTHING
        kind = "Error" if seen.status == "tool_error" else "Result"
        if self._manner.observed != "user":
            return f"{kind}: {text}" if kind == "Error" else text
        return f"{kind} of {name}:\n{text}" if name else f"{kind}: {text}"


def shortened(text: str, most: int) -> str:
    """The first `most` characters, and how many more there are."""
    return text if len(text) <= most else f"{text[:most]}\n[cut: {len(text) - most} more characters]"
