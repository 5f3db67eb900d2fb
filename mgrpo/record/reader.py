"""A run's record as one thing: the rollouts and steps of all its parts, listed quickly and opened one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mgrpo.errors import CorruptionError
from mgrpo.record.rollouts import TOKENIZER
from mgrpo.record.schema import Head, RolloutBody, RolloutHead, StepBody, StepHead
from mgrpo.record.segments import Frame, SegmentReader

PATTERNS = ("rollouts/*", "agents/*/record")


@dataclass(frozen=True, slots=True)
class RecordedRollout:
    head: RolloutHead
    frame: Frame

    def body(self) -> RolloutBody:
        return msgspec.msgpack.decode(self.frame.body(), type=RolloutBody)


@dataclass(frozen=True, slots=True)
class RecordedStep:
    head: StepHead
    frame: Frame

    def body(self) -> StepBody:
        return msgspec.msgpack.decode(self.frame.body(), type=StepBody)


class Recording:
    """The record below one or several folders (a run that was spread over servers leaves one on each).

    A rollout or step that was recorded twice, by a process that was started again, counts once, the last time. Call
    refresh() to see what a live run has added."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._readers: dict[Path, SegmentReader] = {}
        self._decode = msgspec.msgpack.Decoder(Head)
        self.rollouts: dict[str, RecordedRollout] = {}  # by id, in order of arrival
        self.steps: dict[tuple[str, int], RecordedStep] = {}  # by role and step
        self.refresh()

    def refresh(self) -> int:
        """Take in what is new; returns the number of new records. Raises CorruptionError naming the file."""
        new = 0
        for folder in self._parts():
            reader = self._readers.setdefault(folder, SegmentReader(folder))
            for frame in reader.fresh():
                try:
                    head = self._decode.decode(frame.head)
                except msgspec.DecodeError as error:
                    raise CorruptionError(f"{frame.path}: a record cannot be read ({error})") from None
                new += 1
                if isinstance(head, RolloutHead):
                    self.rollouts[head.id] = RecordedRollout(head, frame)
                else:
                    self.steps[head.role, head.step] = RecordedStep(head, frame)
        return new

    def group(self, query: str, k: int) -> Iterator[RecordedRollout]:
        """The recorded rollouts of one training group of k."""
        for rollout in range(k):
            found = self.rollouts.get(f"{query}/{rollout}")
            if found is not None:
                yield found

    def tokenizers(self) -> dict[str, Path]:
        """Role -> the file its tokenizer was kept in."""
        return {
            path.name.removesuffix(f".{TOKENIZER}"): path
            for folder in self._parts()
            for path in folder.glob(f"*.{TOKENIZER}")
        }

    def _parts(self) -> list[Path]:
        return [p for folder in self._folders for pattern in PATTERNS for p in sorted(folder.glob(pattern))]
