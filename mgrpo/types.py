"""The nouns of the system: one trajectory, one rollout, one rollout group.

A trajectory is identified by (run, query, rollout, role, invocation); `query` names one *asking* of a question, so the
same question asked at another step is another query. Token arrays always have the length L of the whole trajectory:
prompt, sampled tokens, tool results, everything the policy saw or said, in order.

A trajectory whose context was rewritten on the way (compacted, say) consists of several segments, one behind the other
in its arrays. Each is a sequence of its own to attention and positions; all share the trajectory's one vote.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Experts = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""(tokens, routers, k): numbers of the experts that each router of a mixture sent a token to, in any order; the dtype's
largest value where nobody recorded it."""

MAIN = "main"
"""Role name of the planner; every other role is a sub-agent role."""


def version_label(role: str, epoch: int, version: int) -> str:
    """What a version of a role's weights is called: epochs tell a trainer's lives apart, which repeat version numbers,
    and the role those of different trainers on one inference server."""
    return f"{role}.e{epoch}.v{version}"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a version of a policy says of a fixed prompt: an engine that holds the version says the same, up to its own
    rounding. It travels with the version and is compared after every update."""

    token_ids: tuple[int, ...]  # (L,), tokens of the tokenizer
    logprobs: tuple[float, ...]
    """(L - 1,) nats: logprobs[i] is of token_ids[i + 1] given token_ids[:i + 1], at temperature 1, among all rows of
    the head: what a server reports for a prompt. Rollouts leave the rows out that are no token."""


def segment_slices(starts: Sequence[int], n: int) -> list[slice]:
    """The slices of n tokens that begin at `starts`. Raises ValueError naming the first that is out of place: they rise
    from 0 and stay below n."""
    starts = tuple(starts)
    if not starts or starts[0] != 0:
        raise ValueError(f"segment_starts {starts[:3]} do not begin with 0")
    for before, start in itertools.pairwise(starts):
        if not before < start < n:
            raise ValueError(
                f"segment start {start} behind {before} is outside {before + 1}..{n - 1} of {n} tokens"
            )
    return [slice(first, last) for first, last in itertools.pairwise((*starts, n))]


@dataclass(slots=True)
class Trajectory:
    """One agent's tokens in one invocation (for the main agent, invocation is 0 and there is one per rollout).

    loss_mask[t] is 1 where token t was sampled by this policy, 0 for prompts, tool output and other agents' text.
    logprobs[t] and versions[t] belong to token t given the tokens before it; where loss_mask is 0 they are 0 and -1.
    scores are this trajectory's own reward parts, each in [0, 1], e.g. {"format": 1.0, "expert": 0.0}.
    segment_starts are offsets into the arrays, the first 0; token t sees the tokens of its own segment only.
    experts[t] are those that the engine sent token t to when it was input; None where routing is not replayed.
    """

    query: str
    rollout: int
    role: str
    invocation: int
    tokens: Int32  # (L,)
    loss_mask: UInt8  # (L,)
    logprobs: Float32  # (L,) nats, under the sampling distribution (temperature included)
    versions: Int32  # (L,) policy version that sampled the token
    scores: dict[str, float] = field(default_factory=dict)
    segment_starts: tuple[int, ...] = (0,)
    experts: Experts | None = None  # (L, N, k)

    def __len__(self) -> int:
        return len(self.tokens)

    def segments(self) -> list[slice]:
        """Where each segment lies in the arrays. Raises ValueError as segment_slices()."""
        return segment_slices(self.segment_starts, len(self))

    def version_span(self) -> tuple[int, int]:
        """(oldest, newest) policy version among the sampled tokens; (-1, -1) when nothing was sampled."""
        sampled = self.versions[self.loss_mask != 0]
        return (int(sampled.min()), int(sampled.max())) if sampled.size else (-1, -1)


@dataclass(slots=True)
class Rollout:
    """Everything one rollout of one query produced. `correct` is the main agent's outcome in [0, 1]."""

    query: str
    rollout: int
    main: Trajectory
    invocations: dict[str, list[Trajectory]]  # sub-agent role -> its trajectories in order of invocation
    correct: float
    info: Mapping[str, object] = field(
        default_factory=dict
    )  # answer, calls, ...: for people, never for the math
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    """The task's own numbers by name, e.g. "sub/task/searches": one for each conversation that reported it."""

    def trajectories(self) -> list[Trajectory]:
        """All of them: the main agent's, then those of each sub-agent role in order of name."""
        return [self.main, *(t for role in sorted(self.invocations) for t in self.invocations[role])]

    def d_k(self) -> dict[str, int]:
        """Number of invocations of each sub-agent role, zeros included."""
        return {role: len(trajectories) for role, trajectories in self.invocations.items()}
