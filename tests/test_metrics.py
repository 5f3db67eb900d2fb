"""metrics.jsonl: whole lines only, whatever a crash or a full disk has done to the file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mgrpo import metrics
from mgrpo.metrics import MetricsWriter, read_metrics


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder)]


@pytest.mark.parametrize(
    "tail", [b'{"step": 2, "time": 1.0, "main/rew', b"\0" * 300_000, b'{"step": 2, "time": 2.0}']
)
def test_an_unfinished_line_is_cut(tmp_path: Path, tail: bytes) -> None:
    """What a killed process or a power cut leaves behind the last whole line never takes the next line with it."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "time": 0.5, "a": 1}\n' + tail)
    with MetricsWriter(tmp_path, print) as writer:
        writer.write(3, 3.0, {"a": 2.0})
    assert steps(tmp_path) == [1, 3]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    """Of a damaged file, every line that is a record is read."""
    lines = [
        b'{"step": 1, "time": 0.5, "a": null}', b'{"step": 9, "ti{"step": 10, "time": 1}', b"17", b"[]", b"\xff\xfe",
        b'{"time": 1.0}', b'{"step": "x", "time": 1.0}', b'{"step": 2, "time": 1.0, "a": "high"}',
        b'{"step": 2, "time": NaN}', b'{"step": 2, "time": 1, "seq": 1e999}',
        b'{"step": 2, "time": 1, "a": 3}',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert steps(tmp_path) == [1, 2]


def test_a_full_disk_is_reported_and_its_lines_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised and no line is torn; with room again every line is written, in order."""
    said: list[str] = []
    write = os.write
    room = [60]

    def limited(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(file, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(metrics.os, "write", limited)
    writer = MetricsWriter(tmp_path, said.append)
    for step in range(1, 5):
        writer.write(step, float(step), {"main/reward/mean": 0.5})
    assert steps(tmp_path) == [1] and (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert len(said) == 1 and "No space left on device" in said[0]
    room[0] = 1 << 20
    writer.write(5, 5.0, {"main/reward/mean": 0.5})
    writer.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert len(said) == 2 and said[1].endswith("written again")


def test_a_file_that_cannot_be_opened_ends_nothing(tmp_path: Path) -> None:
    """A folder in its place: reported at once, and what was lost is said at the end."""
    (tmp_path / "metrics.jsonl").mkdir()
    said: list[str] = []
    with MetricsWriter(tmp_path, said.append) as writer:
        writer.write(1, 1.0, {"a": 1.0})
    assert "Is a directory" in said[0] and "1 lines were not written" in said[-1]
