"""What the records hold. Structs are MessagePack maps, so that any library reads them and fields may be added."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from mgrpo.types import Experts, Trajectory

EVALUATION = "eval"


class RolloutHead(msgspec.Struct, tag="rollout", gc=False):
    """One rollout in one line. `id` is <query>/<rollout>; step is the RL step it was played for (index from 0), for an
    evaluation the step whose weights played it. split: "train", or the evaluation's."""

    id: str
    query: str
    index: int
    rollout: int
    step: int
    split: str
    mode: str  # sampled, greedy
    status: str  # ok, failed
    correct: float
    d_k: dict[str, int]
    tokens: dict[str, int]  # role -> tokens of all its trajectories
    question: str
    answer: str
    gold: str
    at: float = 0.0  # Unix time of the recording
    redacted: bool = False  # of a secret question: its texts are empty, and no tokens are kept
    failed_by: str = ""  # kind of the failure (environments/failure.py); "" in records of before it was kept
    tool_errors: int = 0  # tool calls that its agents got wrong, where the task records them in info["tools"]


class TrajectoryRecord(msgspec.Struct, gc=False):
    """One trajectory. Arrays are little-endian bytes, empty where the step's tokens are not kept (`n` says how many
    there were). versions: one number where all sampled tokens agree, else i32[n]."""

    role: str
    invocation: int
    scores: dict[str, float]
    n: int
    version_min: int
    version_max: int
    tokens: bytes = b""  # i32
    loss_mask: bytes = b""  # u8
    logprobs: bytes = b""  # f32
    versions: bytes = b""  # i32
    segment_starts: tuple[int, ...] = (0,)  # records of before have one segment each
    experts: bytes = b""  # u8 or u16 (n, N, k), with routing replay
    experts_shape: tuple[int, ...] = ()  # N, k, bytes of one number

    def trajectory(self, query: str, rollout: int) -> Trajectory:
        """The trajectory as the worker had it. Raises ValueError where its tokens were not kept."""
        if not self.tokens:
            raise ValueError(f"{query}/{rollout} {self.role}/{self.invocation}: its tokens were not recorded")
        mask = np.frombuffer(self.loss_mask, np.uint8)
        if self.versions:
            versions = np.frombuffer(self.versions, "<i4")
        else:
            versions = np.where(mask != 0, self.version_min, -1).astype(np.int32)
        return Trajectory(
            query=query,
            rollout=rollout,
            role=self.role,
            invocation=self.invocation,
            tokens=np.frombuffer(self.tokens, "<i4"),
            loss_mask=mask,
            logprobs=np.frombuffer(self.logprobs, "<f4"),
            versions=versions,
            scores=self.scores,
            segment_starts=self.segment_starts,
            experts=self._experts(),
        )

    def _experts(self) -> Experts | None:
        if not self.experts_shape:
            return None
        routers, chosen, size = self.experts_shape
        return np.frombuffer(self.experts, f"<u{size}").reshape(self.n, routers, chosen)


class RolloutBody(msgspec.Struct, gc=False):
    trajectories: list[TrajectoryRecord]  # main first, then by role and invocation
    info: dict[str, object]
    failure: str = ""


class StepHead(msgspec.Struct, tag="step", gc=False):
    """One training step of one role (index from 0)."""

    role: str
    step: int
    at: float = 0.0  # Unix time of the recording


ROW = np.dtype(
    [
        ("group", "<i4"),  # index into StepBody.queries
        ("rollout", "<i4"),
        ("invocation", "<i4"),
        ("minibatch", "<i4"),
        ("correct", "<f8"),
        ("reward", "<f8"),
        ("advantage", "<f4"),  # 0 where dropped
        ("multiplicity", "<i4"),  # copies; 0: dropped by the draw
        ("weight", "<f8"),
        ("length", "<i4"),
        ("active", "<i4"),
        ("version_min", "<i4"),
        ("tokens_crc", "<u4"),
        ("loss_mask_crc", "<u4"),
        ("logprobs_crc", "<u4"),
    ]
)
"""One trajectory of the role in a step, kept or dropped: the numbers that training used."""


class MiniBatchRecord(msgspec.Struct, gc=False):
    """crc: crc32c of each tensor over all micro-batches. The tokens are those that enter the model in one forward pass
    over its rows: all of them but the last of each row. Both are 0 in records of before they were counted."""

    denominator: float
    crc: dict[str, int]
    computed_tokens: int = 0
    shared_tokens: int = 0  # not computed, because another row has them


class StepSettings(msgspec.Struct, gc=False):
    """What a step was computed with that a resumed run may change: a replay goes by these, not by the config."""

    lr: float
    threads: int  # of the trainer process
    ranks: int  # processes of the trainer
    data_ranks: int = 0  # of those, with micro-batches of their own; 0: all, as in older records
    share_prefixes: bool = False  # what rows of a micro-batch begin with was computed once


class StepBody(msgspec.Struct, gc=False):
    settings: StepSettings
    k: int
    queries: list[str]
    indices: list[int]
    failed: list[tuple[int, int]]  # (group, rollout)
    mean: list[float]  # per group, as the advantages were computed
    std: list[float]
    rows: bytes  # ROW[n]
    scores: list[dict[str, float]]  # per row
    minibatches: list[MiniBatchRecord]
    metrics: dict[str, float]
    shared: bytes = b""  # i32 per row: its leading tokens that another has computed; b"": none was shared

    def table(self) -> npt.NDArray[np.void]:
        return np.frombuffer(self.rows, ROW)


Head = RolloutHead | StepHead
