"""The store for those who want it alone: what docs/transport.md tells them to type, and what each refusal on the way
tells them to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mgrpo
from mgrpo.errors import DeadlineError, FencedError, MgrpoError, PeerError, RetryAfterError
from mgrpo.store.server import StoreServer
from tests.store_kit import publish, run_params

PAGE = Path(__file__).parent.parent / "docs" / "transport.md"


def blocks() -> tuple[str, str]:
    """The shell line and the Python of the page's section."""
    section = PAGE.read_text().split("\n## By hand\n")[1].split("\n## ")[0]
    shell, python = (re.findall(rf"```{kind}\n(.*?)```", section, re.S) for kind in ("sh", "python"))
    assert len(shell) == len(python) == 1
    return shell[0].strip(), python[0]


def test_what_the_page_says_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in a process of its own, and the page's lines against it; then the same from a checkpoint."""
    shell, python = blocks()
    assert (
        len([line for line in python.splitlines() if line.partition("#")[0].strip()]) <= 21
    )  # twenty, and the import
    monkeypatch.chdir(tmp_path)
    words = shell.split()
    assert words[0] == "mgrpo"
    serving = subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert serving.stdout is not None
        assert "serves at" in serving.stdout.readline()
        names: dict[str, Any] = {}
        exec(compile(python, str(PAGE), "exec"), names)
        np.testing.assert_allclose(names["assigned"].weight, [0.5, 0.5, 1.0])
        assert names["assigned"].denominator == 2.0
        trainer, worker = names["trainer"], names["worker"]
        url = trainer.url
        assert [(t.step, t.query, t.state) for t in trainer.trained("sub")] == [(0, "q7/0", "committed")]
        assert worker.open_group(query="q8/0", k=2, d_max={"sub": 4}, index=1, timeout=0).state == "open"
        for client in (trainer, worker, names["launcher"]):
            client.close()
        with mgrpo.connect(url, role="trainer:sub") as again:
            assert again.resume(checkpoint_step=0).requeued == 0
    finally:
        serving.terminate()
        serving.wait(60)
        assert serving.stdout is not None
        serving.stdout.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[StoreServer]:
    with StoreServer(f"ipc://{tmp_path}/s", tmp_path / "store.db") as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreServer]:
    params = run_params(training_roles=["sub"], batch=1)
    with StoreServer(f"ipc://{tmp_path}/s", tmp_path / "store.db", params) as server:
        yield server


@pytest.mark.parametrize("role", ["worker", "trainer:sub", "observer"])
def test_a_store_without_a_run_says_how_to_create_one(empty: StoreServer, role: str) -> None:
    with pytest.raises(
        PeerError,
        match=r'connect\(url, role="launcher"\)\.create\(mgrpo\.RunParams\(\.\.\.\)\) \[NOT_CREATED\]',
    ):
        mgrpo.connect(empty.url, role=role)
    with mgrpo.connect(empty.url, role="launcher") as launcher:
        launcher.create(run_params())
    mgrpo.connect(empty.url, role=role).close()


def test_another_run_is_refused_with_what_differs(store: StoreServer) -> None:
    """create() of other parameters, a digest that is not the store's, and a launcher that named no run."""
    with mgrpo.connect(store.url, role="launcher") as launcher:
        with pytest.raises(PeerError, match=r"k 2 there, 8 here; take another file, or attach\(\)"):
            launcher.create(run_params(training_roles=["sub"], batch=1, k=8))
        with pytest.raises(PeerError, match=r"digest ''.*call attach\(\), or create\(\)"):
            launcher.requeue("sub", [])
        launcher.attach()
        assert launcher.requeue("sub", []) == []
    with mgrpo.connect(store.url, role="worker", run="other") as worker:
        with pytest.raises(PeerError, match=r"digest 'other'.*'digest-1'; connect with run=None"):
            worker.world()


def test_wrong_roles_are_told_the_right_one(store: StoreServer) -> None:
    """A role of nobody, a trainer of no training role, and a worker that claims."""
    with pytest.raises(
        PeerError, match=r"unknown role 'trainer', expected worker, trainer:<agent>, launcher"
    ):
        mgrpo.connect(store.url, role="trainer")
    with mgrpo.connect(store.url, role="trainer:judge") as judge:
        with pytest.raises(MgrpoError, match=r"'judge' is not a training role.*connect as 'trainer:sub'"):
            judge.resume(-1)
    with mgrpo.connect(store.url, role="observer") as observer:
        with pytest.raises(PeerError, match=r"may not set_control.*connect\(url, role='worker'\)"):
            observer.set_control("stopping")


def test_calls_out_of_order_are_told_what_comes_first(store: StoreServer) -> None:
    """Groups before a version, claims before resume and before groups, rollouts before their invocations, commits
    before apply."""
    with (
        mgrpo.connect(store.url, role="worker") as worker,
        mgrpo.connect(store.url, role="trainer:sub") as early,
    ):
        with pytest.raises(
            RetryAfterError, match=r"not published a version yet: its trainer calls status\(version=0"
        ):
            worker.open_group(query="a", k=2, d_max={"sub": 4}, index=0, timeout=0)
        with pytest.raises(
            FencedError, match=r"not called resume\(checkpoint_step\), -1 without a checkpoint"
        ):
            early.claim(1, timeout=0)
        with publish(store.url, "sub") as trainer:
            group = worker.open_group(query="a", k=2, d_max={"sub": 4}, index=0)
            with pytest.raises(
                DeadlineError, match=r"fewer are sealed.*workers have 1 groups open, and 1 of them"
            ):
                trainer.claim(1, timeout=0.1)
            with pytest.raises(MgrpoError, match=r"d_k names \[\], .*each needs its number, 0 where"):
                worker.rollout_final(group, 0, reward=1.0, correct=1.0, d_k={}).result(60)
            with pytest.raises(
                MgrpoError, match=r"1 invocations of 'sub', 0 have arrived: call invocation_done"
            ):
                worker.rollout_final(group, 0, reward=1.0, correct=1.0, d_k={"sub": 1}).result(60)
            with pytest.raises(RetryAfterError, match=r"admits 1 until its trainer calls status\(\)"):
                worker.open_group(query="b", k=2, d_max={"sub": 4}, index=1, timeout=0)
            with pytest.raises(
                MgrpoError, match=r"commit of step 0, .*up to -1; call apply\(step, groups\) first"
            ):
                trainer.commit(0)
