"""The worker's side of the record: each rollout as it ends, and the tokenizers that make text of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from mgrpo.config.run import RecordConfig
from mgrpo.record.schema import EVALUATION, RolloutBody, RolloutHead, TrajectoryRecord
from mgrpo.record.segments import SegmentWriter
from mgrpo.types import Rollout, Trajectory

TEXT = 300  # characters of a question or an answer in a record's head
TOKENIZER = "tokenizer.json"


class RolloutRecorder:
    """Writes rollouts to a folder; does nothing when recording is switched off."""

    def __init__(self, config: RecordConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._writer = SegmentWriter(folder, int(config.max_mb * 1e6)) if config.enabled else None
        self._encoder = msgspec.msgpack.Encoder(enc_hook=str)  # info may hold anything: it is for people

    def tokenizer(self, role: str, files: Mapping[str, bytes]) -> None:
        """Keep a role's tokenizer, given the files of its policy's shell."""
        if self._writer is not None and TOKENIZER in files:
            (self._folder / f"{role}.{TOKENIZER}").write_bytes(files[TOKENIZER])

    def train(
        self, step: int, index: int, query: str, rollout: int, asked: tuple[str, str], played: Rollout | None,
        failure: str,
    ) -> None:  # fmt: skip
        """A rollout of a training group; `asked` is its question and gold answer, failure why there is none."""
        if self._writer is None:
            return
        every = self._config.tokens_every
        keep = every > 0 and step % every == 0
        self._write(
            _head(query, rollout, (step, index), ("train", "sampled"), asked, played),
            _body(played, failure, keep),
        )

    def evaluation(
        self, step: int, split: str, mode: str, number: int, asked: tuple[str, str], played: Rollout | None
    ) -> None:
        """A rollout of an evaluation: question `number` of `split`. Only the first few are kept."""
        if self._writer is None or number >= self._config.evaluation:
            return
        query = f"{EVALUATION}/{split}/{step}/{mode}/{number}"
        self._write(_head(query, 0, (step, number), (split, mode), asked, played), _body(played, "", True))

    def _write(self, head: RolloutHead, body: RolloutBody) -> None:
        assert self._writer is not None
        self._writer.append(self._encoder.encode(head), self._encoder.encode(body))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _trajectories(rollout: Rollout) -> list[Trajectory]:
    return [rollout.main, *(t for role in sorted(rollout.invocations) for t in rollout.invocations[role])]


def _head(
    query: str, number: int, place: tuple[int, int], how: tuple[str, str], asked: tuple[str, str],
    rollout: Rollout | None,
) -> RolloutHead:  # fmt: skip
    tokens: dict[str, int] = {}
    for trajectory in _trajectories(rollout) if rollout else []:
        tokens[trajectory.role] = tokens.get(trajectory.role, 0) + len(trajectory)
    answer = rollout.info.get("answer") if rollout else None
    return RolloutHead(
        id=f"{query}/{number}",
        query=query,
        index=place[1],
        rollout=number,
        step=place[0],
        split=how[0],
        mode=how[1],
        status="ok" if rollout else "failed",
        correct=rollout.correct if rollout else 0.0,
        d_k=rollout.d_k() if rollout else {},
        tokens=tokens,
        question=asked[0][:TEXT],
        answer="" if answer is None else str(answer)[:TEXT],
        gold=asked[1][:TEXT],
    )


def _body(rollout: Rollout | None, failure: str, keep: bool) -> RolloutBody:
    if rollout is None:
        return RolloutBody([], {}, failure)
    return RolloutBody([_record(t, keep) for t in _trajectories(rollout)], dict(rollout.info))


def _record(trajectory: Trajectory, keep: bool) -> TrajectoryRecord:
    low, high = trajectory.version_span()
    record = TrajectoryRecord(
        trajectory.role, trajectory.invocation, trajectory.scores, len(trajectory), low, high
    )
    if keep:
        record.tokens = trajectory.tokens.tobytes()
        record.loss_mask = trajectory.loss_mask.tobytes()
        record.logprobs = trajectory.logprobs.tobytes()
        record.versions = trajectory.versions.tobytes() if low != high else b""
    return record
