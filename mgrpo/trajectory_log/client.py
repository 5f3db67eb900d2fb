"""A rollout worker's way into a trajectory log."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from mgrpo.trajectory_log.format import MAX_EXPERTS, Append, LogRef, Meta, split_experts
from mgrpo.transport import codec
from mgrpo.transport.client import Answer, Client
from mgrpo.transport.codec import Sender
from mgrpo.types import Trajectory


class TrajectoryLogClient:
    """A worker's pipelined way into one role's trajectory log."""

    def __init__(self, url: str, *, digest: str, role: str, name: str = "worker", **options: Any) -> None:
        sender = Sender(digest, "worker", name, "")
        self.url = url
        self._link = Client(url, peer=f"trajectory log of {role}", sender=sender, **{"window": 64, **options})

    def append(self, trajectory: Trajectory, *, attempt: int = 0, index: int = 0) -> Future[LogRef]:
        """Send a trajectory; the future has its reference once it is durable. `index` is its group's. Raises ValueError
        where its experts are more than a message takes."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "tokens": np.asarray(trajectory.tokens, np.int32),
            "logprobs": np.asarray(trajectory.logprobs, np.float32),
            "versions": np.asarray(trajectory.versions, np.int32),
            "loss_mask": np.asarray(trajectory.loss_mask, np.uint8),
        }
        t, experts = trajectory, trajectory.experts
        if experts is not None:
            if why := too_many_experts(t):
                raise ValueError(why)
            arrays |= split_experts(experts)
        specs, frames = codec.pack_arrays(arrays)
        meta = Meta(
            t.query,
            t.rollout,
            t.role,
            t.invocation,
            attempt,
            index,
            t.scores,
            len(t),
            tuple(t.segment_starts),
            () if experts is None else (*experts.shape[1:], experts.itemsize),
        )
        answer = self._link.submit(
            "append", Append(meta, specs), frames, queue=f"append({t.query!r})", bulk=True
        )
        result: Future[LogRef] = Future()
        answer.add_done_callback(lambda done: _pass_on(done, result))
        return result

    def flush(self, timeout: float | None = None) -> None:
        self._link.flush(timeout)

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> TrajectoryLogClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def too_many_experts(trajectory: Trajectory) -> str:
    """Why append() does not take it; "" where it does. All segments of a trajectory together may be longer than its
    agent's max_length."""
    t, experts = trajectory, trajectory.experts
    if experts is None or experts.nbytes <= MAX_EXPERTS:
        return ""
    return (
        f"{t.query}/{t.rollout} {t.role}/{t.invocation}: experts {experts.shape} of its tokens are {experts.nbytes} "
        f"bytes, the limit is {MAX_EXPERTS}; set agents.{t.role}.max_length lower, or policy.routing_replay=false"
    )


def _pass_on(answer: Future[Answer], result: Future[LogRef]) -> None:
    error = answer.exception()
    if error is not None:
        result.set_exception(error)
    else:
        result.set_result(answer.result().decode(LogRef))
