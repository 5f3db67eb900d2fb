"""What an operator does with a store: look into it while it runs, mend it, copy it, stop it, watch it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mgrpo
from mgrpo.cli.keys import app as keys_app
from mgrpo.cli.store import app as store_app
from mgrpo.errors import ConfigError, PeerError
from mgrpo.store.inspect import inspect
from mgrpo.store.prometheus import MetricsEndpoint
from mgrpo.store.server import StoreServer
from tests.chaos.kills import ROOT, running_store
from tests.store_kit import DIGEST, fill, publish, queries, run_params

RUN = CliRunner()


def from_outside(path: Path, times: int) -> str:
    """What `mgrpo store inspect` prints, from another process."""
    code = (
        "import sys; from mgrpo.cli.store import inspect; [inspect(__import__('pathlib').Path(sys.argv[1])) "
    )
    code += f"for _ in range({times})]"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_three_nacks_quarantine_a_group_until_it_is_requeued(tmp_path: Path) -> None:
    """The reason shows in inspect while the server runs; admission gives its place to another group."""
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params(max_lag=1)) as store:
        main, sub = publish(store.url, "main"), publish(store.url, "sub")
        with mgrpo.connect(store.url, role="worker", run=DIGEST) as worker:
            fill(worker, "bad", index=0)
            fill(worker, "b", index=1)
            worker.flush()
            for _ in range(3):
                main.nack(main.claim(1, timeout=60), "log-probs do not match")
            assert queries(main.claim(1, timeout=60)) == ["b"]
            shown = from_outside(tmp_path / "s.db", 1)
            assert "groups: 2 sealed" in shown
            assert "role sub: 2 ready" in shown
            assert "quarantined for main: 0 bad: log-probs do not match" in shown
            with pytest.raises(ConfigError, match="this very process"):
                inspect(tmp_path / "s.db")
            mended = RUN.invoke(store_app, ["requeue", "bad", "--url", store.url, "--role", "main"])
            assert mended.output == "bad: ready\n"
            assert queries(main.claim(1, timeout=60)) == ["bad"]
        main.close()
        sub.close()


def test_inspect_is_safe_and_consistent_on_a_file_under_load(tmp_path: Path) -> None:
    """A reader that copies while a writer commits and checkpoints sees whole groups only, and never disturbs
    it."""
    params = run_params(max_lag=60_000)  # however long the copies take, there is room for more groups
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", params) as store:
        for role in ("main", "sub"):
            publish(store.url, role).close()
        stop = threading.Event()
        written = 0

        def write() -> None:
            nonlocal written
            with mgrpo.connect(store.url, role="worker", run=DIGEST) as worker:
                while not stop.is_set():
                    fill(worker, f"q{written}", index=written)
                    written += 1
                worker.flush()

        thread = threading.Thread(target=write)
        thread.start()
        shown = from_outside(tmp_path / "s.db", 15)
        stop.set()
        thread.join()
        counts = re.findall(r"groups: (.*)", shown)
        seen = [sum(map(int, re.findall(r"\d+", line))) for line in counts]
        assert len(seen) == 15
        assert seen == sorted(seen)
        assert 0 < seen[-1] <= written
        assert store.failure is None
    assert inspect(tmp_path / "s.db").groups == {"sealed": written}
    with pytest.raises(ConfigError, match="no store"):
        inspect(tmp_path / "nothing.db")


def test_a_backup_taken_while_running_is_a_store(tmp_path: Path) -> None:
    """VACUUM INTO: the copy starts, holds what was acknowledged, and is for its owner only."""
    copy = tmp_path / "copy.db"
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params()) as store:
        for role in ("main", "sub"):
            publish(store.url, role).close()
        with mgrpo.connect(store.url, role="worker", run=DIGEST) as worker:
            fill(worker, "a", index=0)
            worker.flush()
            with pytest.raises(PeerError, match="FORBIDDEN"):
                worker._link.call("backup", str(copy))
        assert RUN.invoke(store_app, ["backup", str(copy), "--url", store.url]).exit_code == 0
    assert copy.stat().st_mode & 0o077 == 0
    with StoreServer("tcp://127.0.0.1:0", copy) as store, publish(store.url, "main") as main:
        assert queries(main.claim(1, timeout=60)) == ["a"]


def test_sigterm_ends_a_store_in_order(tmp_path: Path) -> None:
    """Exit status 0, nothing left in the WAL, and the next start needs no recovery."""
    with running_store(tmp_path) as store:
        publish(store.url, "main").close()
        store.process.send_signal(signal.SIGTERM)
        assert store.process.wait(60) == 0
        wal = tmp_path / "s.db-wal"
        assert not wal.exists() or wal.stat().st_size == 0
        store.start()
        with mgrpo.connect(store.url, role="observer", timeout=20) as observer:
            assert observer.stats()["roles"]["main"]["epoch"] == 1


def test_prometheus_can_read_the_numbers(tmp_path: Path) -> None:
    """Counts by state and role, requests, refusals, commits."""
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params()) as store:
        for role in ("main", "sub"):
            publish(store.url, role).close()
        with mgrpo.connect(store.url, role="worker", run=DIGEST) as worker:
            fill(worker, "a", index=0)
            worker.flush()
            worker.wait(sealed=1, timeout=60)
        store._measured = 0.0
        endpoint = MetricsEndpoint(store.metrics, 0)
        try:
            wanted = 'mgrpo_store_groups{state="sealed"} 1.0'
            text = ""
            for _ in range(100):
                with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics") as page:
                    text = page.read().decode()
                if wanted in text:
                    break
                threading.Event().wait(0.05)
            assert wanted in text
            assert 'mgrpo_store_deliveries{role="main",state="ready"} 1.0' in text
            assert 'mgrpo_store_handled_total{method="rollout_final"} 2.0' in text
            with pytest.raises(ConfigError, match="metrics port"):
                MetricsEndpoint(store.metrics, endpoint.port)
        finally:
            endpoint.close()


def test_keys_are_made_on_the_command_line(tmp_path: Path) -> None:
    """init once, add as often as there are peers."""
    folder = str(tmp_path / "keys")
    assert RUN.invoke(keys_app, ["init", "--dir", folder]).exit_code == 0
    added = RUN.invoke(keys_app, ["add", "node1", "--role", "worker", "--dir", folder])
    assert added.exit_code == 0
    assert (tmp_path / "keys" / "node1.key").stat().st_mode & 0o777 == 0o600
    assert isinstance(
        RUN.invoke(keys_app, ["add", "node1", "--role", "worker", "--dir", folder]).exception, ConfigError
    )
    assert isinstance(RUN.invoke(store_app, []).exception, ConfigError)
