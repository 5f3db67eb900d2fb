"""What happens to a run's folder: nothing before everything is accepted, one launcher at a time, and a run that never
began blocks nobody."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgrpo.config import RunConfig, check_same_run, config_digest, dump_config, load_config
from mgrpo.errors import ConfigError
from mgrpo.run import launch
from mgrpo.run.folder import RunFolder
from mgrpo.run.lock import is_locked, take_lock
from mgrpo.run.processes import run_params
from mgrpo.store.server import StoreServer
from mgrpo.view.data import RunView
from tests.runs import RELAY, wait_for


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run that has begun."""
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    config = load_config(RELAY)
    dump_config(config, folder.config)
    StoreServer(f"ipc://{tmp_path}/s", folder.database, run_params(config)).close()
    folder.database_lock.unlink()
    folder.summary.write_text(json.dumps({"outcome": "finished", "trained": True, "heldout": {"final": 0.9}}))
    return folder


def content(folder: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=2", "seed = 3 -> 2"),
        ("agents.left.optimizer.lr=5e-4", "agents.left.optimizer.lr = 0.003 -> 0.0005"),
        ("trainer.group_size=8", "trainer.group_size = 4 -> 8"),
        ("task.options.fail_every=3", "task.options"),
        ("agents.left.frozen=true", "agents.left.frozen = false -> true"),
        ("agents.main.model=/no/such/folder", r'agents.main.model = unset -> "/no/such/folder"'),
        ("trainer.steps=0", "trainer.steps"),
        ("trainer.no_such=1", "trainer.no_such: unknown key"),
    ],
)
def test_a_resume_with_another_setting_changes_nothing(run: RunFolder, override: str, words: str) -> None:
    """Refused by the field's name with both values, and every file has the bytes that it had."""
    before = content(run)
    with pytest.raises(ConfigError, match=words):
        launch.resume(run.root, [override])
    assert content(run) == before


@pytest.mark.parametrize(
    "override",
    ["trainer.steps=99", "store.timeout=5", "eval.every=7", "record.enabled=false", "rollout.workers=2",
     "trainer.checkpoint_every=3", "trainer.stop_timeout=9", "agents.main.url=tcp://127.0.0.1:7"],
)  # fmt: skip
def test_what_changes_no_number_may_change(override: str) -> None:
    """Length, places, measuring and keeping are no part of what is computed."""
    check_same_run(load_config(RELAY), load_config(RELAY, [override]))


SERVICES = """task.options={ url = "http://a", tools = { web = { type = "serper", url = "http://a/x", pure = true } },
score = { judge = { url = "http://a", model = "m", key_env = "KEY", asks = 3, template = "{answer}" } },
blocked = { urls = ["http://a"] } }"""


def of_services(*overrides: str) -> RunConfig:
    stage = (
        'task.stages=[{ until = 1 }, { options = { score = { judge = { url = "http://b", model = "n" } } } }]'
    )
    return load_config(RELAY, [SERVICES.replace("\n", " "), stage, *overrides])


@pytest.mark.parametrize(
    "override",
    ["task.options.url=http://c", "task.options.tools.web.url=http://c", "task.options.score.judge.url=http://c",
     "task.options.score.judge.key_env=OTHER", "task.options.tools.web.max_outage=5",
     "task.stages.1.options.score.judge.url=http://c"],
)  # fmt: skip
def test_services_may_move(override: str) -> None:
    """Address, key and patience of a service, wherever in a task's options, are no part of what is computed; reading
    the digest leaves the config as it is."""
    before, after = of_services(), of_services(override)
    assert before != after
    check_same_run(before, after)
    assert config_digest(before) == config_digest(after)
    assert before == of_services()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.options.score.judge.model=x", 'task.options.score.judge.model = "m" -> "x"'),
        ("task.options.score.judge.asks=1", "task.options.score.judge.asks = 3 -> 1"),
        ("task.options.score.judge.template=x", "task.options.score.judge.template"),
        ("task.options.tools.web.pure=false", "task.options.tools.web.pure = true -> false"),
        ("task.options.tools.web.type=brave", "task.options.tools.web.type"),
        ('task.options.blocked.urls=["http://c"]', "task.options.blocked.urls"),
        ("task.stages.1.options.score.judge.model=x", "task.stages"),
    ],
)
def test_what_services_say_may_not_change(override: str, words: str) -> None:
    """Another model, prompt, kind of service or block list is another run."""
    with pytest.raises(ConfigError, match=words):
        check_same_run(of_services(), of_services(override))


@pytest.mark.parametrize("fresh", [False, True])
def test_two_launchers_on_one_folder(run: RunFolder, fresh: bool) -> None:
    """The second is refused by name, with --fresh too, and the run of the first is as it was."""
    lock = take_lock(run.lock)
    try:
        before = content(run)
        with pytest.raises(ConfigError, match=f"{run.root}.*another mgrpo train is running"):
            launch.start(RELAY, run.root, [], fresh=True) if fresh else launch.resume(run.root, [])
        assert content(run) == before
    finally:
        os.close(lock)


def test_a_lock_outlives_its_launcher_with_its_processes_and_no_longer(run: RunFolder) -> None:
    """The children of a killed launcher keep the folder; a lock file that nobody holds, as kill -9 leaves it, is no
    live run to whoever looks, nor in the way of the next launcher."""
    lock = take_lock(run.lock)
    child = subprocess.Popen(["sleep", "1000"], pass_fds=[lock])
    try:
        os.close(lock)
        assert is_locked(run.lock) and run.live
    finally:
        child.kill()
        child.wait(60)
    assert run.lock.exists() and not run.live
    assert RunView(run.root).overview()["live"] is False
    os.close(take_lock(run.lock))


def test_a_lock_file_that_its_holder_deletes_is_no_lock(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the last launcher may have deleted the file: then a new one is taken, which others
    can see."""
    real, deleted = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        real(descriptor, how)
        if not deleted:
            deleted.append(run.lock.unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = take_lock(run.lock)
    monkeypatch.undo()
    assert deleted and is_locked(run.lock)
    os.close(lock)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file in the way, and a file system that takes nothing."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run-of-a-test")):
        with pytest.raises(ConfigError, match=str(out)):
            launch.start(RELAY, out, [], fresh=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_config_that_cannot_be_written_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the old file stays whole, the message names it and the reason."""

    def full(path: Path, data: str) -> None:
        raise OSError(28, "No space left on device")

    before = content(run)
    monkeypatch.setattr("mgrpo.config.load.write_atomic", full)
    with pytest.raises(ConfigError, match=r"config\.json: cannot write .*No space left on device"):
        dump_config(load_config(RELAY), run.config)
    assert content(run) == before


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Starts that got as far as starting processes."""
    started: list[str] = []
    monkeypatch.setattr(launch._Launch, "run", lambda self: started.append(str(self._folder.root)))
    yield started


@pytest.mark.parametrize(
    ("summary", "replaced"),
    [
        ({"outcome": "failed", "trained": False}, True),
        ({"outcome": "failed", "trained": True}, False),
        ({"outcome": "finished", "trained": True}, False),
        ({"outcome": "interrupted", "trained": False}, False),
        ({"outcome": "failed"}, False),
        (["failed"], False),
        (None, False),
    ],
)
def test_only_a_run_that_failed_untrained_makes_room(
    run: RunFolder, launched: list[str], summary: object, replaced: bool
) -> None:
    """What failed before anything was trained does not block the next start with the same --out; all else does."""
    run.summary.unlink()
    if summary is not None:
        run.summary.write_text(json.dumps(summary))
    before = content(run)
    if replaced:
        launch.start(RELAY, run.root, [], fresh=False)
        assert launched == [str(run.root)] and set(content(run)) == {str(run.config)}
    else:
        with pytest.raises(ConfigError, match="already holds a run"):
            launch.start(RELAY, run.root, [], fresh=False)
        assert content(run) == before and not launched


def test_an_accepted_change_is_kept(
    run: RunFolder, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before the store has accepted the run: then config.json holds the new setting, and all others."""
    seen = []

    def accepts(self: launch._Launch) -> None:
        seen.append(load_config(run.config).trainer.steps)
        self._accepted()

    monkeypatch.setattr(launch._Launch, "run", accepts)
    launch.resume(run.root, ["trainer.steps=99"])
    assert seen == [load_config(RELAY).trainer.steps]
    assert load_config(run.config) == load_config(RELAY, ["trainer.steps=99"])


def test_a_store_whose_thread_dies_ends_with_the_cause(tmp_path: Path) -> None:
    """A bug in a tick of the store: its process does not stay and keep everybody waiting, but ends by name."""
    code = (
        "import sys; from pathlib import Path; from mgrpo.store.core import Core; from mgrpo import cli\n"
        "def tick(self, now): raise KeyError('a lease that nobody knows')\n"
        "Core.tick = tick\n"
        "sys.argv = ['mgrpo', 'store', '--config', sys.argv[1], '--out', sys.argv[2]]\n"
        "cli.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(RELAY), str(tmp_path / "run")],
        stderr=subprocess.PIPE, text=True, cwd=RELAY.parent.parent,
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: process.poll() is not None, "the end of the store")
        finally:
            process.kill()
        assert process.returncode == 1 and process.stderr is not None
        last = process.stderr.read().strip().splitlines()[-1]
    assert last.startswith("error: the server at ipc://") and "KeyError: 'a lease that nobody knows'" in last
