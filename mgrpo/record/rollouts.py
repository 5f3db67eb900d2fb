"""The worker's side of the record: each rollout as it ends, and the tokenizers that make text of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from mgrpo.config.record import RecordConfig
from mgrpo.record.redaction import WITHHELD, redacted_info
from mgrpo.record.schema import EVALUATION, RolloutBody, RolloutHead, TrajectoryRecord
from mgrpo.record.writer import RecordWriter, Report
from mgrpo.types import Rollout, Trajectory

TEXT = 300  # characters of a question or an answer in a record's head
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and its gold answer. secret: its id where nothing but ids, scores and lengths may be kept of it, no
    text and no token; None for any other question."""

    text: str
    gold: str
    secret: str | None = None


class RolloutRecorder:
    """Writes rollouts to a folder; does nothing when recording is switched off. Never raises: neither a disk that is
    full nor what a task puts into Rollout.info may end a worker."""

    def __init__(self, config: RecordConfig, folder: Path, report: Report) -> None:
        """report: takes one line when recording has to stop."""
        self._config = config
        self._writer = RecordWriter(folder, int(config.max_mb * 1e6), report) if config.enabled else None
        self._encoder = msgspec.msgpack.Encoder(enc_hook=str)  # info may hold anything: it is for people

    def tokenizer(self, role: str, files: Mapping[str, bytes]) -> None:
        """Keep a role's tokenizer, given the files of its policy's shell."""
        if self._writer is not None and TOKENIZER in files:
            self._writer.file(f"{role}.{TOKENIZER}", files[TOKENIZER])

    def train(
        self, step: int, index: int, query: str, rollout: int, asked: Asked | tuple[str, str],
        played: Rollout | None, failure: str, kind: str = "",
    ) -> None:  # fmt: skip
        """A rollout of a training group; `asked` is its question and gold answer, failure why there is none, kind that
        of the failure."""
        if self._writer is None or not self._writer.active:
            return
        every, asked = self._config.tokens_every, _asked(asked)
        keep = every > 0 and step % every == 0
        self._write(
            _head(query, rollout, (step, index), ("train", "sampled", kind), asked, played),
            _body(played, failure, keep, asked.secret),
        )

    def evaluation(
        self, step: int, split: str, mode: str, number: int, asked: Asked | tuple[str, str],
        played: Rollout | None, failure: str = "", kind: str = "",
    ) -> None:  # fmt: skip
        """A rollout of an evaluation: question `number` of `split`; failure and kind as in train(). Only the first few
        are kept."""
        if self._writer is None or not self._writer.active or number >= self._config.evaluation:
            return
        query, asked = f"{EVALUATION}/{split}/{step}/{mode}/{number}", _asked(asked)
        self._write(
            _head(query, 0, (step, number), (split, mode, kind), asked, played),
            _body(played, failure, True, asked.secret),
        )

    def _write(self, head: RolloutHead, body: RolloutBody) -> None:
        assert self._writer is not None
        self._writer.append(head.step, self._encoder.encode(head), self._encoded(body))

    def _encoded(self, body: RolloutBody) -> bytes:
        try:
            return self._encoder.encode(body)
        except Exception as error:  # whatever the __str__ of a task's own object raises
            body.info = {"not recorded": clean(f"{type(error).__name__}: {error}")}
            return self._encoder.encode(body)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _asked(asked: Asked | tuple[str, str]) -> Asked:
    return asked if isinstance(asked, Asked) else Asked(*asked)


def _number(value: object) -> float:
    """A score as a task gave it; NaN for what is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _head(
    query: str, number: int, place: tuple[int, int], how: tuple[str, str, str], asked: Asked,
    rollout: Rollout | None,
) -> RolloutHead:  # fmt: skip
    tokens: dict[str, int] = {}
    for trajectory in rollout.trajectories() if rollout else []:
        tokens[trajectory.role] = tokens.get(trajectory.role, 0) + len(trajectory)
    answer = rollout.info.get("answer") if rollout else None
    if asked.secret is not None:
        asked, answer = Asked("", "", asked.secret), None
    return RolloutHead(
        id=f"{query}/{number}",
        query=query,
        index=place[1],
        rollout=number,
        step=place[0],
        split=how[0],
        mode=how[1],
        status="ok" if rollout else "failed",
        correct=_number(rollout.correct) if rollout else 0.0,
        d_k=rollout.d_k() if rollout else {},
        tokens=tokens,
        question=clean(asked.text),
        answer="" if answer is None else clean(answer),
        gold=clean(asked.gold),
        at=time.time(),
        redacted=asked.secret is not None,
        failed_by="" if rollout else how[2],
        tool_errors=_tool_errors(rollout),
    )


def _tool_errors(rollout: Rollout | None) -> int:
    calls = rollout.info.get("tools") if rollout else None
    if not isinstance(calls, list | tuple):
        return 0
    return sum(isinstance(call, Mapping) and call.get("status") == "tool_error" for call in calls)


def clean(value: object) -> str:
    """A value as a short text that can be encoded: lone surrogates become question marks."""
    try:
        text = str(value)
    except Exception as error:  # a task's own object
        text = f"({type(value).__name__}, whose __str__ raised {type(error).__name__})"
    return text[:TEXT].encode("utf-8", "replace").decode()


def _body(rollout: Rollout | None, failure: str, keep: bool, secret: str | None) -> RolloutBody:
    if rollout is None:
        return RolloutBody([], {}, clean(failure) if secret is None else WITHHELD)
    info = dict(rollout.info) if secret is None else redacted_info(rollout, secret)
    return RolloutBody([_record(t, keep and secret is None) for t in rollout.trajectories()], info)


def _record(trajectory: Trajectory, keep: bool) -> TrajectoryRecord:
    low, high = trajectory.version_span()
    scores = {str(name): _number(value) for name, value in trajectory.scores.items()}
    record = TrajectoryRecord(trajectory.role, trajectory.invocation, scores, len(trajectory), low, high)
    record.segment_starts = trajectory.segment_starts
    if keep:
        record.tokens = trajectory.tokens.tobytes()
        record.loss_mask = trajectory.loss_mask.tobytes()
        record.logprobs = trajectory.logprobs.tobytes()
        record.versions = trajectory.versions.tobytes() if low != high else b""
        if trajectory.experts is not None:
            record.experts = np.ascontiguousarray(trajectory.experts).tobytes()
            record.experts_shape = (*trajectory.experts.shape[1:], trajectory.experts.itemsize)
    return record
