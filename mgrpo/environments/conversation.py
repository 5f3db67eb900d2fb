"""One conversation while it happens: what an agent saw and sampled, token by token, in one or several segments.

    append(...), sample(...), append(...), ...     history is append-only: the ids that were sampled are trained on
    fork(ids)                                      the program rewrote its history (compacted it, say): what follows is
                                                   sampled behind `ids` alone, as a segment of the same trajectory

A segment is a sequence of its own: attention and positions begin anew, an engine holds it under a session of its own,
and max_length bounds each alone. One in which nothing was sampled is no part of the trajectory: there is nothing in it
to train on, and its vote is the others'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from mgrpo._C import philox4x32_10
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.environments.attempt import AttemptOverError
from mgrpo.environments.conversation_spans import ConversationSpans
from mgrpo.environments.reported_experts import joined, merged
from mgrpo.environments.tools import outside_tools
from mgrpo.errors import ContextOverflowError, RolloutError
from mgrpo.model.tokens import Tokenizer, decode_piece, encode_piece, encode_start
from mgrpo.record import spans
from mgrpo.types import Experts, Trajectory


@dataclass(frozen=True, slots=True)
class Agent:
    """One role's policy as an episode sees it. max_length bounds a trajectory in tokens, each of its segments alone."""

    role: str
    engine: Engine
    tokenizer: Tokenizer
    temperature: float
    max_length: int


@dataclass(slots=True)
class _Segment:
    """One sequence in the making: tokens, with what Trajectory says of each."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    experts: Experts | None = None
    """Of its first tokens, where the engine reports them."""

    def extend(
        self, ids: Sequence[int], sampled: int, logprobs: Sequence[float], versions: Sequence[int]
    ) -> None:
        self.ids.extend(ids)
        self.mask.extend([sampled] * len(ids))
        self.logprobs.extend(logprobs)
        self.versions.extend(versions)

    def context(self, ids: Sequence[int]) -> None:
        self.extend(ids, 0, [0.0] * len(ids), [-1] * len(ids))


class Conversation:
    """One trajectory in the making."""

    def __init__(
        self, agent: Agent, query: str, rollout: int, invocation: int, seed: int, attempt: int = 0
    ) -> None:
        self.agent = agent
        self.query, self.rollout, self.invocation = query, rollout, invocation
        self.scores: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.mismatches = 0  # retokenization: turns that training would see with other ids than were sampled
        self.last: Generation | None = None  # the turn that was sampled last
        self.closed = False
        self._over = False
        self._seed, self._attempt = seed, attempt
        self._spans = ConversationSpans()
        self._turn = 0
        self._sampling = False
        self._past: list[_Segment] = []  # segments that were forked away from, each with a sampled token
        self._forks = 0
        self._now = _Segment()
        self._seen: list[int] = []  # the segment at the end of its last turn
        # The attempt is part of the name: what an engine still holds of a failed one is no history of the next.
        self._session = self._name = f"{query}/{rollout}/{attempt}/{agent.role}/{invocation}"

    def __len__(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment.ids) for segment in self._past) + len(self._now.ids)

    @property
    def segments(self) -> int:
        """How many there are, the current one included."""
        return len(self._past) + 1

    @property
    def remaining(self) -> int:
        """Tokens left in this segment before max_length."""
        return self.agent.max_length - len(self._now.ids)

    def last_sampled(self) -> int:
        """The token the policy sampled last in this segment."""
        for token, sampled in zip(reversed(self._now.ids), reversed(self._now.mask), strict=True):
            if sampled:
                return token
        raise ValueError(f"nothing was sampled yet in {self._session}")

    def encode(self, text: str) -> list[int]:
        """The ids that append(text) would append, to see whether the conversation has so many remaining. Raises as
        mgrpo.model.tokens.encode_piece."""
        encode = encode_piece if self._now.ids else encode_start
        return encode(self.agent.tokenizer, text)

    def append(self, text: str) -> None:
        """Add context (prompt, tool output, another agent's words): seen by the policy, never trained on. Raises as
        encode() and append_ids()."""
        self.append_ids(self.encode(text))

    def append_ids(self, ids: Sequence[int]) -> None:
        """append() of token ids. Raises ContextOverflowError where fewer remain, ValueError for
        what is no token id and while a turn is sampled."""
        ids = self._checked(ids)
        self._check_idle("appended to")
        if len(ids) > self.remaining:
            raise self._overflow(f"{len(ids)} more tokens of context")
        self._now.context(ids)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
            raise ValueError(
                f"token ids {min(ids)}..{max(ids)} appended to {self._session} are outside 0..2**31 - 1"
            )
        return ids

    def _check_idle(self, what: str) -> None:
        """The turn's tokens would follow what the policy has not seen."""
        if self._sampling:
            raise ValueError(f"{self._session} is {what} while a turn is sampled: await the turn first")

    def fork(self, ids: Sequence[int]) -> None:
        """Begin a segment whose context is `ids`: what follows sees these and nothing from before. A segment in which
        nothing was sampled is replaced. Raises ContextOverflowError where max_length is below their number, ValueError
        for no ids, for what is no token id and while a turn is sampled; nothing is changed then."""
        ids = self._checked(ids)
        if not ids:
            raise ValueError(f"{self._session} is forked with no ids: a segment begins with context")
        self._check_idle("forked")
        if len(ids) > self.agent.max_length:
            raise self._overflow(f"{len(ids)} tokens of context of a new segment", behind=0)
        self.release()
        if any(self._now.mask):
            self._past.append(self._now)
        self._forks += 1
        self._now, self._seen = _Segment(), []
        self._session = f"{self._name}+{self._forks}"
        self._now.context(ids)

    async def sample(self, max_tokens: int, stop: str) -> str:
        """Sample until the single token `stop`, or max_tokens; returns the decoded text. Raises as
        sample_ids()."""
        tokenizer = self.agent.tokenizer
        stop_ids = tuple(encode_piece(tokenizer, stop))
        if len(stop_ids) != 1:
            raise ValueError(
                f"stop {stop!r} is {len(stop_ids)} tokens for role {self.agent.role}, expected 1"
            )
        ids = await self.sample_ids(SamplingParams(max_tokens, self.agent.temperature, stop_ids))
        text = decode_piece(tokenizer, ids)
        self.mismatches += encode_piece(tokenizer, text) != ids
        return text

    async def sample_ids(self, params: SamplingParams) -> list[int]:
        """As sample(), in token ids. The noise is a function of (seed, rollout, role, invocation, turn). Raises
        ContextOverflowError where fewer than max_tokens remain, ValueError while another turn is sampled,
        AttemptOverError once the episode has ended."""
        if self._over:
            raise AttemptOverError(f"{self._session} is not continued: its attempt has ended")
        if params.max_tokens > self.remaining:
            raise self._overflow(f"a turn of {params.max_tokens} tokens")
        self._check_idle("asked for another turn")
        now = self._now
        self.mismatches += now.ids[: len(self._seen)] != self._seen
        outside_tools(f"{self._session} samples")
        self._sampling, context, out, began = True, len(now.ids), None, spans.now()
        engine = self.agent.engine
        try:
            out = await engine.generate(
                now.ids, params, seed=mix(self._seed, self._turn), session=self._session
            )
        finally:
            self._sampling = False
            self._spans.turn(self._turn, began, context, out, engine)
        self._turn, self.last = self._turn + 1, out
        ids = [int(i) for i in out.token_ids]
        now.extend(ids, 1, [float(x) for x in out.logprobs], [int(v) for v in out.versions])
        if out.experts is not None:
            now.experts = merged(now.experts, out.experts, len(now.ids), self._session)
        self._seen = list(now.ids)
        return ids

    def _overflow(self, what: str, behind: int | None = None) -> ContextOverflowError:
        role, limit = self.agent.role, self.agent.max_length
        behind = len(self._now.ids) if behind is None else behind
        return ContextOverflowError(
            f"{self._session}: {what} do not fit behind {behind} tokens of role {role!r}, max_length is {limit}; "
            f"set agents.{role}.max_length higher, or let the task cut what it appends to Conversation.remaining"
        )

    def close(self, **scores: float) -> None:
        """End the trajectory with its own reward parts, each in [0, 1]. Raises RolloutError for any other score."""
        self.scores = {
            name: unit_score(value, f"score {name!r} of {self._session}") for name, value in scores.items()
        }
        self.closed = True
        self._spans.close()
        self.release()

    def metric(self, name: str, value: float) -> None:
        """Report a number of this conversation; the mean over its role's conversations becomes `<role>/task/<name>`. It
        takes no part in training. A later value of the same name replaces it. Raises RolloutError for a name that is no
        identifier and a value that is no finite number."""
        self.metrics[name] = finite_metric(name, value, self._session)

    def end(self) -> None:
        """Nothing more is sampled here: whoever tries is cancelled."""
        self._over = True

    def release(self) -> None:
        """Free what the engine holds of this conversation. Idempotent."""
        self.agent.engine.release(self._session)

    def tool_span(self, name: str) -> AbstractContextManager[None]:
        """Around a tool's work that does not come through Episode.tool, such as a search within this process: the
        timeline of the rollout shows it, and no metric measures it."""
        return self._spans.tool(name)

    def record(self) -> None:
        """Keep the spans of its turns and its own, once, when the attempt has ended."""
        lane = f"{self.query}/{self.rollout}"
        self._spans.keep(lane, self.agent.role, self.invocation, self._attempt)

    def trajectory(self) -> Trajectory:
        """The conversation so far, as arrays."""
        return self._joined([*self._past, self._now])

    def _joined(self, segments: Sequence[_Segment]) -> Trajectory:
        return Trajectory(
            query=self.query,
            rollout=self.rollout,
            role=self.agent.role,
            invocation=self.invocation,
            tokens=np.concatenate([np.asarray(s.ids, np.int32) for s in segments]),
            loss_mask=np.concatenate([np.asarray(s.mask, np.uint8) for s in segments]),
            logprobs=np.concatenate([np.asarray(s.logprobs, np.float32) for s in segments]),
            versions=np.concatenate([np.asarray(s.versions, np.int32) for s in segments]),
            scores=dict(self.scores),
            segment_starts=(0, *accumulate(len(s.ids) for s in segments[:-1])),
            experts=joined([s.experts for s in segments], [len(s.ids) for s in segments], self._name),
        )

    def final_trajectory(self) -> Trajectory:
        """The whole of it, but for a last segment in which nothing was sampled. Raises RolloutError where it cannot be
        trained on."""
        if not self.closed:
            raise RolloutError(f"{self._name} was opened and never closed; close() it with its scores")
        segments = [*self._past, self._now] if any(self._now.mask) else self._past
        if not segments:
            raise RolloutError(
                f"{self._name} has no sampled token among {len(self)}: nothing of it can be trained"
            )
        logprobs = [x for segment in segments for x in segment.logprobs]
        if not all(map(math.isfinite, logprobs)):
            at = next(i for i, x in enumerate(logprobs) if not math.isfinite(x))
            raise RolloutError(f"{self._name}: the log-prob of token {at} is {logprobs[at]}")
        return self._joined(segments)


def unit_score(value: object, what: str) -> float:
    """`value` as a float in [0, 1]; RolloutError naming `what` for NaN, None, text or any other number."""
    number = _number(value)
    if not 0.0 <= number <= 1.0:
        raise RolloutError(f"{what} is {value!r:.100}, expected a number in [0, 1]")
    return number


def finite_metric(name: str, value: object, where: str) -> float:
    """`value` as a float; RolloutError for NaN, infinity, text or a name that is no identifier."""
    if not (isinstance(name, str) and name.isidentifier()):
        raise RolloutError(f"metric {name!r:.100} of {where}: expected a name of letters, digits and _")
    number = _number(value)
    if not math.isfinite(number):
        raise RolloutError(f"metric {name!r} of {where} is {value!r:.100}, expected a finite number")
    return number


def _number(value: object) -> float:
    """`value` as a float; NaN for None, text or what is no number."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def mix(seed: int, salt: int) -> int:
    """A 64-bit seed derived from (seed, salt) by one Philox block."""
    words = philox4x32_10(
        [salt & 0xFFFFFFFF, (salt >> 32) & 0xFFFFFFFF, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    )
    return int(words[0]) | (int(words[1]) << 32)
