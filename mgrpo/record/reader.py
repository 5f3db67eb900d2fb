"""A run's record as one thing: the rollouts and steps of all its parts, listed quickly and opened one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from mgrpo.errors import CorruptionError
from mgrpo.record.notes import read_notes
from mgrpo.record.rollouts import TOKENIZER
from mgrpo.record.schema import Head, RolloutBody, RolloutHead, StepBody, StepHead
from mgrpo.record.segments import Frame, SegmentReader

Body = TypeVar("Body", RolloutBody, StepBody)
PATTERNS = ("rollouts/*", "agents/*/record")


@dataclass(frozen=True, slots=True)
class RecordedRollout:
    head: RolloutHead
    frame: Frame

    def body(self) -> RolloutBody:
        """Raises CorruptionError naming the file that is damaged or gone."""
        return _decoded(self.frame, RolloutBody)


@dataclass(frozen=True, slots=True)
class RecordedStep:
    head: StepHead
    frame: Frame

    def body(self) -> StepBody:
        """Raises CorruptionError naming the file that is damaged or gone."""
        return _decoded(self.frame, StepBody)


class Recording:
    """The record below one or several folders (a run that was spread over servers leaves one on each).

    A rollout or step that was recorded twice, by a process that was started again, counts once, the last time; a
    trainer that went back to an earlier step has left the steps from there on, which go from the list until it takes
    them again. Call refresh() to see what a live run has added."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._readers: dict[Path, SegmentReader] = {}
        self._decode = msgspec.msgpack.Decoder(Head)
        self.rollouts: dict[str, RecordedRollout] = {}  # by id, in order of arrival
        self.steps: dict[tuple[str, int], RecordedStep] = {}  # by role and step
        self._last: dict[str, int] = {}  # the highest step of each role up to now
        self.refresh()

    def refresh(self) -> int:
        """Take in what is new; returns the number of new records. What cannot be read is passed over (see notes)."""
        new = 0
        for folder in self._parts():
            reader = self._readers.setdefault(folder, SegmentReader(folder))
            for frame in reader.fresh():
                try:
                    head = self._decode.decode(frame.head)
                except msgspec.DecodeError as error:
                    reader.damaged.setdefault(frame.path, f"a record cannot be read ({error})")
                    continue
                new += 1
                if isinstance(head, RolloutHead):
                    self._add_rollout(RecordedRollout(head, frame))
                else:
                    self._add_step(RecordedStep(head, frame))
        return new

    def _add_rollout(self, rollout: RecordedRollout) -> None:
        # Two workers' records may both hold it, where a resumed run divides the groups among another number of them.
        known = self.rollouts.get(rollout.head.id)
        if known is None or known.head.at <= rollout.head.at:
            self.rollouts[rollout.head.id] = rollout

    def _add_step(self, step: RecordedStep) -> None:
        role, number, at = step.head.role, step.head.step, step.head.at
        if number <= self._last.get(
            role, -1
        ):  # taken again: what came after it then is of a history that was left
            known = self.steps.get((role, number))
            if known is not None and known.head.at > at:
                return
            for key in [
                k for k, s in self.steps.items() if k[0] == role and k[1] > number and s.head.at < at
            ]:
                del self.steps[key]
        self.steps[role, number] = step
        self._last[role] = max(number, self._last.get(role, -1))

    def notes(self) -> list[str]:
        """A line for each gap of the record: where recording stopped and why, and which files are damaged."""
        lines: list[str] = []
        for folder in self._parts():
            lines += [f"{folder}: {note}" for note in read_notes(folder)]
            reader = self._readers.get(folder)
            lines += [f"{path}: {what}" for path, what in (reader.damaged if reader else {}).items()]
        return lines

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


def _decoded(frame: Frame, kind: type[Body]) -> Body:
    try:
        return msgspec.msgpack.decode(frame.body(), type=kind)
    except msgspec.DecodeError as error:
        raise CorruptionError(
            f"{frame.path} at byte {frame.offset}: a record cannot be read ({error})"
        ) from None
