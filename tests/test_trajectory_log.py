"""The trajectory log: what is acknowledged can be read back bit for bit, also after a crash in the middle of a
record."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgrpo.errors import ConflictError, CorruptionError, DeadlineError, PeerError
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.trajectory_log.format import LogRef, Meta
from mgrpo.trajectory_log.log import TrajectoryLog
from mgrpo.transport.codec import Refusal
from mgrpo.transport.server import Server
from tests.store_kit import DIGEST, make_trajectory, same


def served(tmp_path: Path, **options: int) -> tuple[TrajectoryLog, Server]:
    trajectory_log = TrajectoryLog(tmp_path / "trajectories", role="sub", digest=DIGEST, **options)
    return trajectory_log, Server("tcp://127.0.0.1:0", trajectory_log.handlers(), barrier=trajectory_log.sync)


def test_trajectories_come_back_bit_for_bit_as_views(tmp_path: Path) -> None:
    """Small and large ones, several in flight; the arrays read are views, no Python lists."""
    trajectory_log, server = served(tmp_path)
    with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        sent = [make_trajectory("q", i, "sub", 0, n) for i, n in enumerate((0, 1, 7, 5000, 200_000))]
        refs = [client.append(t) for t in sent]
        for trajectory, ref in zip(sent, refs, strict=True):
            back = trajectory_log.read(ref.result(10))
            assert same(trajectory, back)
            assert not back.tokens.flags.owndata


def test_a_torn_tail_is_cut_and_everything_before_it_stays(tmp_path: Path) -> None:
    """Cut the file at every byte of the last record: the first two records survive, the third can be sent
    again."""
    trajectory_log, server = served(tmp_path)
    with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        sent = [make_trajectory("q", i, "sub", 0, 20) for i in range(3)]
        refs = [client.append(t).result(10) for t in sent]
    path = tmp_path / "trajectories" / "00000001.segment"
    whole = path.read_bytes()
    for cut in range(refs[2].offset, len(whole) - 8, 13):
        path.write_bytes(whole[:cut])
        with TrajectoryLog(tmp_path / "trajectories", role="sub", digest=DIGEST) as again:
            assert len(again) == 2
            assert all(same(t, again.read(r)) for t, r in zip(sent[:2], refs[:2], strict=True))
    path.write_bytes(whole)
    with TrajectoryLog(tmp_path / "trajectories", role="sub", digest=DIGEST) as again:
        assert len(again) == 3
        damaged = bytearray(whole)
        damaged[refs[1].offset + 60] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match="byte"):
            again.read(refs[1])


def test_the_same_trajectory_again_gets_the_same_reference(tmp_path: Path) -> None:
    """Also after a restart; other content under the identity is a conflict, another attempt is another
    identity."""
    trajectory = make_trajectory("q", 0, "sub", 0)
    refs = []
    for _ in range(2):
        trajectory_log, server = served(tmp_path)
        with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
            refs += [client.append(trajectory).result(10) for _ in range(2)]
            other = make_trajectory("q", 0, "sub", 0, n=41)
            with pytest.raises(ConflictError):
                client.append(other).result(10)
            assert client.append(other, attempt=1).result(10) != refs[0]
    assert refs == [refs[0]] * 4


def test_truncation_removes_only_segments_below_the_cursor(tmp_path: Path) -> None:
    """A closed segment goes when every group in it is below the cursor; the open one never."""
    trajectory_log, server = served(tmp_path, segment_bytes=2000)
    with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        sent = [make_trajectory(f"q{i}", 0, "sub", 0) for i in range(20)]
        refs = [client.append(t, index=i).result(10) for i, t in enumerate(sent)]
    with TrajectoryLog(tmp_path / "trajectories", role="sub", digest=DIGEST) as trajectory_log:
        assert trajectory_log.truncate(below=0) == 0
        kept = [i for i, ref in enumerate(refs) if ref.segment >= refs[10].segment]
        assert trajectory_log.truncate(below=kept[0] + 1) == refs[10].segment - 1
        assert all(same(sent[i], trajectory_log.read(refs[i])) for i in kept)
        with pytest.raises(CorruptionError):
            trajectory_log.read(refs[0])


def test_bad_trajectories_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """NaN log-probs, a wrong role, a wrong run, lengths that differ."""
    trajectory_log, server = served(tmp_path)
    with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        bad = make_trajectory("q", 0, "sub", 0)
        bad.logprobs[3] = np.nan
        short = make_trajectory("q", 0, "sub", 0)
        short.loss_mask = short.loss_mask[:-1]
        mask = make_trajectory("q", 0, "sub", 0)
        mask.loss_mask[0] = 2
        for trajectory in (bad, short, mask, make_trajectory("q", 0, "main", 0)):
            with pytest.raises(PeerError, match=r"BAD_REQUEST|FORBIDDEN"):
                client.append(trajectory).result(10)
        with TrajectoryLogClient(server.url, digest="other", role="sub") as stranger:
            with pytest.raises(PeerError, match="WRONG_RUN"):
                stranger.append(make_trajectory("q", 0, "sub", 0)).result(10)
        assert len(trajectory_log) == 0
    assert (tmp_path / "trajectories" / "00000001.segment").stat().st_size == 16


@pytest.mark.parametrize("call", ["fdatasync", "pwrite"])
def test_a_failing_disk_acknowledges_nothing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """While writes or syncs fail no reference is given; the same request succeeds once the disk works again."""
    trajectory_log, server = served(tmp_path)
    with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        first = client.append(make_trajectory("q", 0, "sub", 0)).result(10)
        with monkeypatch.context() as broken:
            broken.setattr(f"mgrpo.trajectory_log.log.os.{call}", _no_space)
            late = client.append(make_trajectory("q", 1, "sub", 0))
            time.sleep(0.5)
            assert not late.done()
        assert same(trajectory_log.read(late.result(10)), make_trajectory("q", 1, "sub", 0))
        assert same(trajectory_log.read(first), make_trajectory("q", 0, "sub", 0))
    with TrajectoryLog(tmp_path / "trajectories", role="sub", digest=DIGEST) as again:
        assert len(again) == 2


def _no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_failure_takes_back_everything_that_is_not_yet_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Two records of one turn, the second fails: the sync must not confirm the first, which was cut off with
    it."""
    with TrajectoryLog(
        tmp_path / "trajectories", role="sub", digest=DIGEST, segment_bytes=300
    ) as trajectory_log:
        metas = [Meta("q", i, "sub", 0, 0, 0, {}, 10) for i in range(2)]
        trajectory_log.append(metas[0], bytes(130))
        with monkeypatch.context() as broken:
            broken.setattr(f"mgrpo.trajectory_log.log.os.{call}", _no_space)
            with pytest.raises(Refusal, match=r"UNAVAILABLE|No space"):
                trajectory_log.append(metas[1], bytes(130))
                trajectory_log.append(Meta("q", 2, "sub", 0, 0, 0, {}, 10), bytes(130))
            with pytest.raises(Refusal, match="could not be kept"):
                trajectory_log.sync()
        refs = [trajectory_log.append(meta, bytes(130)) for meta in metas]
        trajectory_log.sync()
        assert [trajectory_log.read(ref).rollout for ref in refs] == [0, 1]


def test_every_array_is_aligned_whatever_the_names_lengths_are(tmp_path: Path) -> None:
    """In the file, and in memory: the batcher's C++ reads them where they lie."""
    trajectory_log, server = served(tmp_path)
    with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        for i in range(40):
            sent = make_trajectory("q" * (i + 1), i, "sub", 0, n=i)
            ref = client.append(sent).result(60)
            back = trajectory_log.read(ref)
            assert same(sent, back) and ref.offset % 8 == 0
            for name in ("tokens", "logprobs", "versions"):
                array = getattr(back, name)
                assert array.flags.aligned and not array.flags.writeable, f"{name} of trajectory {i}"
            assert back.tokens.ctypes.data % 8 == 0 or not i
            payload = trajectory_log._name(ref.segment).read_bytes().rindex(sent.tokens.tobytes()) if i else 0
            assert payload % 8 == 0


def three_records(tmp_path: Path, segment_bytes: int = 1 << 20) -> tuple[list[Any], list[LogRef]]:
    trajectory_log, server = served(tmp_path, segment_bytes=segment_bytes)
    with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        sent = [make_trajectory("q", i, "sub", 0, 20) for i in range(3)]
        return sent, [client.append(t).result(60) for t in sent]


@pytest.mark.parametrize("segment_bytes", [1 << 20, 200], ids=["last segment", "closed segment"])
@pytest.mark.parametrize("place", ["magic", "meta length", "payload length", "checksum", "meta", "payload"])
def test_damage_in_the_middle_costs_no_other_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, segment_bytes: int, place: str
) -> None:
    """A flipped bit anywhere in an acknowledged record that others follow: it is logged with file and byte, reading it
    raises CorruptionError, the others stay, and nothing is appended over any of them."""
    sent, refs = three_records(tmp_path, segment_bytes)
    at = {"magic": 0, "meta length": 5, "payload length": 12, "checksum": 17, "meta": 30, "payload": 150}[
        place
    ]
    path = tmp_path / "trajectories" / f"{refs[1].segment:08d}.segment"
    damaged = bytearray(path.read_bytes())
    damaged[refs[1].offset + at] ^= 4
    path.write_bytes(damaged)
    trajectory_log, server = served(tmp_path, segment_bytes=segment_bytes)
    with trajectory_log, server, TrajectoryLogClient(server.url, digest=DIGEST, role="sub") as client:
        assert len(trajectory_log) == 2 and f"{path} is damaged from byte {refs[1].offset}" in caplog.text
        again = client.append(sent[1]).result(60)
        assert same(trajectory_log.read(again), sent[1]) and again != refs[1]
        for i in (0, 2):
            assert same(trajectory_log.read(refs[i]), sent[i])
            assert client.append(sent[i]).result(60) == refs[i]
        with pytest.raises(CorruptionError, match=rf"{path.name}: no valid record at byte {refs[1].offset}"):
            trajectory_log.read(refs[1])


def test_a_trajectory_log_of_an_older_format_is_refused_by_name(tmp_path: Path) -> None:
    """Its records lie elsewhere; nothing of it is cut."""
    three_records(tmp_path)
    path = tmp_path / "trajectories" / "00000001.segment"
    old = path.read_bytes().replace(b"mgrpo traj 3", b"mgrpo traj 1")
    path.write_bytes(old)
    with pytest.raises(CorruptionError, match=r"00000001\.segment has format 1, this program knows format 3"):
        TrajectoryLog(tmp_path / "trajectories", role="sub", digest=DIGEST)
    assert path.read_bytes() == old


def test_names_of_segments_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is synced after a segment is created and after one is deleted."""
    synced: list[list[str]] = []
    monkeypatch.setattr(
        "mgrpo.trajectory_log.log.sync_folder",
        lambda path: synced.append(sorted(p.name for p in path.iterdir())),
    )
    with TrajectoryLog(
        tmp_path / "trajectories", role="sub", digest=DIGEST, segment_bytes=100
    ) as trajectory_log:
        for i in range(3):
            trajectory_log.append(Meta("q", i, "sub", 0, 0, i, {}, 10), bytes(130))
            assert trajectory_log._name(trajectory_log._segment).name in synced[-1]
        trajectory_log.truncate(below=3)
        assert synced[-1] == ["00000003.segment"]


def test_whoever_waits_for_a_full_disk_hears_that_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline's error ends with what the trajectory log answered meanwhile."""
    trajectory_log, server = served(tmp_path)
    with (
        trajectory_log,
        server,
        TrajectoryLogClient(server.url, digest=DIGEST, role="sub", timeout=2.0) as client,
    ):
        monkeypatch.setattr("mgrpo.trajectory_log.log.os.pwrite", _no_space)
        with pytest.raises(
            DeadlineError, match=r"trajectory log of sub at .*append\('q'\).*No space left on device"
        ):
            client.append(make_trajectory("q", 0, "sub", 0)).result(60)
