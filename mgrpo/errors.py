"""Typed errors. Every message names the value and the bound, or the peer, step and queue that was waited for."""

from __future__ import annotations


class MgrpoError(Exception):
    """Base of every error that is not a plain ValueError/TypeError."""


class ConfigError(MgrpoError):
    """A setting, a file or a combination of both that a run cannot start with (exit status 2)."""


class ChatError(ConfigError, ValueError):
    """A message that the chat template of its model cannot carry. Raised before a run starts it is a mistake in the
    config; raised in a rollout it fails that rollout, which is counted and never scored 0."""


class ServiceError(ConfigError):
    """A search, reader, judge or other service that no retry helps with: its key is refused, its model unknown, it was
    down for longer than max_outage, a replay asks for what was not recorded. Ends the run by name; a resumed run goes
    on."""


class StartValidationError(MgrpoError):
    """The policies that RL starts from are not a valid start for the comparison the run makes."""


class DeadlineError(MgrpoError, TimeoutError):
    """A wait reached its deadline; the message names peer, step and queue."""


class PeerError(MgrpoError, ConnectionError):
    """A peer refused us, spoke another protocol or went away; the message names it."""


class ConflictError(MgrpoError):
    """A record arrived under a known key with other content. The first write stays."""


class GroupClosedError(MgrpoError):
    """The store has sealed or dropped a group before all its rollouts had ended, so it takes no more records of it. The
    rollout worker skips what is left of the group; the message names group and reason."""


class CorruptionError(MgrpoError):
    """Stored bytes do not match their checksum or layout; the message names the file."""


class CheckpointError(MgrpoError):
    """The disk took no checkpoint: it is full, or gone. The message names both; earlier checkpoints are as they were.
    Exit status 2, since starting again makes no room."""


class InfrastructureError(MgrpoError):
    """An engine, tool or judge failed: the trajectory leaves its group, it is never scored 0."""


class RolloutError(MgrpoError, ValueError):
    """A rollout that cannot be trained on: a score that is no number, a conversation without a sampled token. This
    rollout fails and is counted, it is never scored 0; the run goes on."""


class ContextOverflowError(RolloutError):
    """A trajectory has too few tokens remaining for what is to be appended or sampled. The message names role,
    length and max_length."""


class NumericsError(MgrpoError):
    """Numbers that no training step may be taken with: NaN or infinite logits, log-probs or gradients."""


class TrajectoryError(MgrpoError, ValueError):
    """A trajectory, seal or query that the batcher rejects; its state is as before.

    kind is the reason in one word: too_long, empty, no_trainable, reward, logprobs, loss_mask, length, segments,
    token_id, id, rollout, invocation, sealed, empty_rollout, duplicate, dropped, dtype, arena_full.
    trajectory is -1 where the call was about a rollout.
    """

    def __init__(self, message: str, kind: str, query: str, rollout: int, trajectory: int) -> None:
        super().__init__(message)
        self.kind, self.query, self.rollout, self.trajectory = kind, query, rollout, trajectory

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.kind, self.query, self.rollout, self.trajectory)


class TrajectoryTypeError(TrajectoryError, TypeError):
    """An array of a trajectory has the wrong dtype, dimension or memory layout."""


class TrajectoryConflictError(TrajectoryError, ConflictError):
    """A trajectory or seal contradicts what is already known of its place. The first write stays."""


class ArenaFullError(TrajectoryError):
    """Back-pressure: the arena has no room for this trajectory until groups are dropped."""


def trajectory_error(message: str, kind: str, query: str, rollout: int, trajectory: int) -> TrajectoryError:
    """The typed error of a rejection in the C++ core."""
    types: dict[str, type[TrajectoryError]] = {
        "dtype": TrajectoryTypeError,
        "duplicate": TrajectoryConflictError,
        "sealed": TrajectoryConflictError,
        "arena_full": ArenaFullError,
    }
    return types.get(kind, TrajectoryError)(message, kind, query, rollout, trajectory)


class FencedError(PeerError):
    """A newer holder of our role or of our attempt exists: what we still hold is not ours any more."""


class RetryAfterError(MgrpoError):
    """The peer refuses new work for now; nothing was stored. `seconds` is its advice."""

    def __init__(self, message: str, seconds: float = 0.1) -> None:
        super().__init__(message)
        self.seconds = seconds


class GroupHeldError(RetryAfterError):
    """Another rollout worker that is alive has this group in hand; the message names it. Other groups may be open to
    us."""
