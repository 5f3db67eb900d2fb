"""Encrypted links: who gets in, as what, and how those who do not get in are told."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

import mgrpo
from mgrpo.errors import ConfigError, PeerError
from mgrpo.store.server import StoreServer
from mgrpo.transport.keys import LOOK_S, ClientKeys, ServerKeys, add_key, init_keys
from tests.store_kit import DIGEST, run_params


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    init_keys(folder)
    for name, role in (("w", "worker"), ("t", "trainer:main"), ("l", "launcher")):
        add_key(folder, name, role)
    return folder


@pytest.fixture
def store(tmp_path: Path, keys: Path) -> Iterator[StoreServer]:
    with StoreServer(
        "tcp://127.0.0.1:0", tmp_path / "s.db", run_params(), security=ServerKeys(keys)
    ) as server:
        yield server


def enter(store: StoreServer, role: str, key: ClientKeys | None):  # type: ignore[no-untyped-def]
    return mgrpo.connect(store.url, role=role, run=DIGEST, key=key, timeout=5.0)


def test_secret_files_are_for_their_owner_only(keys: Path) -> None:
    """0600 from the first byte, refused when widened; nothing is overwritten."""
    for path in (keys / "server.secret", keys / "w.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="exists"):
        init_keys(keys)
    (keys / "w.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ClientKeys.load(keys / "w.key")
    with pytest.raises(ConfigError, match="role 'boss'"):
        add_key(keys, "x", "boss")
    with pytest.raises(ConfigError, match="name"):
        add_key(keys, "../x", "worker")


def test_listed_peers_work_and_their_key_decides_their_role(store: StoreServer, keys: Path) -> None:
    """A worker's key cannot act as a trainer or launcher, whatever it says it is."""
    with enter(store, "trainer:main", ClientKeys.load(keys / "t.key")) as trainer:
        trainer.resume(-1)
        trainer.status(version=0, step=-1, checkpoint_step=-1)
    worker_key = ClientKeys.load(keys / "w.key")
    with enter(store, "worker", worker_key) as worker:
        assert worker.stats()["open"] == 0
    for role in ("launcher", "trainer:main", "trainer:sub"):
        started = time.monotonic()
        with pytest.raises(PeerError, match=r"that of a worker, not of a"):
            with enter(store, role, worker_key) as impostor:
                impostor.set_control("stopping")
        assert time.monotonic() - started < 2.0


def test_wrong_keys_are_a_named_error_and_write_nothing(store: StoreServer, keys: Path) -> None:
    """Wrong server key, unlisted client, no encryption at all: each within two seconds."""
    good = ClientKeys.load(keys / "w.key")
    public, secret = zmq.curve_keypair()
    cases = {
        "wrong server key": replace(good, server=zmq.curve_keypair()[0]),
        "allow-list": replace(good, public=public, secret=secret),
        "encrypted": None,
    }
    for message, key in cases.items():
        started = time.monotonic()
        with enter(store, "worker", key) as peer:
            with pytest.raises(PeerError, match=message):
                peer.report("x", {})
        assert time.monotonic() - started < 2.0, message
    with enter(store, "launcher", ClientKeys.load(keys / "l.key")) as launcher:
        assert launcher.reports(after=-1) == []


def test_an_encrypted_client_at_a_plain_server_is_told(tmp_path: Path, keys: Path) -> None:
    """The other way round."""
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "p.db", run_params()) as plain:
        with enter(plain, "worker", ClientKeys.load(keys / "w.key")) as peer:
            with pytest.raises(PeerError, match="encrypted"):
                peer.stats()


def test_the_allow_list_is_read_again_without_a_restart(store: StoreServer, keys: Path) -> None:
    """A new key gets in, a removed one is refused on its open connection."""
    late_key = ClientKeys.load(add_key(keys, "late", "worker"))
    time.sleep(2 * LOOK_S)
    with enter(store, "worker", late_key) as late:
        assert late.stats()["open"] == 0
        (keys / "allowed" / "late.pub").unlink()
        time.sleep(2 * LOOK_S)
        with pytest.raises(PeerError, match="not in the allow-list any more"):
            late.stats()
    shutil.rmtree(keys / "allowed")
    time.sleep(2 * LOOK_S)
    with enter(store, "worker", ClientKeys.load(keys / "w.key")) as gone:
        with pytest.raises(PeerError, match="allow-list"):
            gone.stats()


def test_a_server_beyond_this_machine_needs_keys(
    tmp_path: Path, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """tcp that is not loopback: refused without keys, allowed with them, and said loudly with --insecure."""
    with StoreServer("tcp://0.0.0.0:0", tmp_path / "a.db", run_params(), security=ServerKeys(keys)):
        pass
    with StoreServer("tcp://0.0.0.0:0", tmp_path / "b.db", run_params(), insecure=True):
        assert "IS NOT ENCRYPTED" in caplog.text
