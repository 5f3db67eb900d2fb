"""The folder of a run's local sockets: ours alone, short enough, and the same for every part of the run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mgrpo.config import RunConfig, load_config
from mgrpo.errors import ConfigError
from mgrpo.run.folder import RunFolder
from mgrpo.transport.address import IPC_PATH_LIMIT
from tests.runs import RELAY

LONG = "scratch-of-a-project-" * 6


@pytest.fixture
def config() -> RunConfig:
    return load_config(RELAY)


@pytest.fixture
def temporary(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, without a runtime folder. Short, unlike pytest's."""
    place = runtime.with_name("tmp")
    place.mkdir()
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def runtime() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as folder:
        place = Path(folder) / "run"
        place.mkdir()
        yield place


def test_it_is_made_for_this_user_alone_and_goes_with_the_run(
    config: RunConfig, temporary: Path, tmp_path: Path
) -> None:
    """Mode 0700 below the temporary folder; nothing of it is left."""
    folder = RunFolder(tmp_path / "run")
    with folder.sockets(config):
        assert folder.socket_folder.parent == temporary
        assert folder.socket_folder.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []


def test_the_runtime_folder_comes_first_where_it_is_ours(
    config: RunConfig, temporary: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XDG_RUNTIME_DIR if it is there; a part whose environment lacks it still finds the folder that exists."""
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "gone"))
    assert folder.socket_folder.parent == temporary
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert folder.socket_folder.parent == runtime
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with folder.sockets(config):  # a launcher without the variable, a part with it
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        assert folder.socket_folder.parent == temporary


def test_a_long_temporary_folder_is_passed_over(
    config: RunConfig, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's TMPDIR may be longer than a socket's path can be: /tmp takes its place."""
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / LONG))
    folder = RunFolder(tmp_path / "run")
    folder.check_sockets(config)
    assert folder.socket_folder.parent == Path("/tmp")
    assert all(len(url) <= len("ipc://") + IPC_PATH_LIMIT for url in folder.addresses(config).agents.values())


def test_a_path_that_fits_nowhere_is_refused_with_what_to_set(temporary: Path, tmp_path: Path) -> None:
    """An agent's name of a hundred letters: path, length, bound and the variables, before anything exists."""
    name = "n" * 100
    tree = load_config(RELAY).model_dump(mode="json")
    tree["agents"][name] = tree["agents"].pop("left")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"{name}: .* bytes, the limit is {IPC_PATH_LIMIT}; set TMPDIR"):
        folder.check_sockets(RunConfig.model_validate(tree))
    assert list(temporary.iterdir()) == [] and not folder.root.exists()


def link(folder: Path) -> None:
    target = folder.with_name("elsewhere")
    target.mkdir(mode=0o700)
    folder.symlink_to(target)


def foreign(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make a folder of somebody else")
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)


def opened(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (link, "it is a link"),
        (foreign, "belongs to user 12345"),
        (opened, "its mode is 0777"),
        (Path.touch, "no folder"),
    ],
)
def test_a_folder_that_others_may_have_made_is_refused(
    config: RunConfig, temporary: Path, tmp_path: Path, prepare: Callable[[Path], object], words: str
) -> None:
    """Whoever got there first could take over the run's sockets: named, whether a launcher or a part comes."""
    folder = RunFolder(tmp_path / "run")
    prepare(folder.socket_folder)
    for use in (folder.check_sockets, folder.make_socket_folder):
        with pytest.raises(ConfigError, match=words) as error:
            use(config)
        assert str(folder.socket_folder) in str(error.value)


def test_a_run_on_addresses_needs_no_folder(temporary: Path, tmp_path: Path) -> None:
    """Every part at an address of its own: no local socket, no folder, no complaint about its place."""
    urls = [
        f"agents.{role}.url=tcp://127.0.0.1:{5000 + i}" for i, role in enumerate(("main", "left", "right"))
    ]
    config = load_config(RELAY, ["store.url=tcp://127.0.0.1:4999", *urls])
    opened(RunFolder(tmp_path / "run").socket_folder)
    with RunFolder(tmp_path / "run").sockets(config):
        pass
