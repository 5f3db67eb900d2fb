"""The command line: help at once, and every mistake one line and exit status 2 with nothing half-started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

ROOT = Path(__file__).parent.parent
ATLAS = str(ROOT / "examples" / "atlas" / "atlas.toml")


def mgrpo(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mgrpo", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a mistake gets."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_help_names_every_command_and_imports_little() -> None:
    """--help answers without torch: what makes it slow is not loaded."""
    code = (
        "import sys; sys.argv = ['mgrpo', '--help']\n"
        "from mgrpo.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip().endswith("False"), done.stderr
    for command in ("train", "eval", "init-task", "store", "trainer", "rollout"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "train needs a config file and --out FOLDER"),
        (["train", "nowhere.toml", "--out", "OUT"], "nowhere.toml: cannot read"),
        (["train", ATLAS, "--out", "OUT", "--set", "trainer.stepz=1"], "trainer.stepz: unknown key"),
        (["train", ATLAS, "--out", "OUT", "--set", "task.name=atlantis"], "atlantis"),
        (["train", ATLAS, "--out", "OUT", "--set", "task.options.search=google"], "options.search"),
        (["train", "--resume", "OUT"], "no run to resume"),
        (["eval", "OUT"], "not a run's folder"),
        (["trainer", ATLAS, "--agent", "nobody", "--out", "OUT"], "--agent nobody: unknown role"),
        (["rollout", ATLAS, "--worker", "7", "--out", "OUT"], "--worker 7: expected 0 to 0"),
        (["train", "--frobnicate"], "No such option"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    """The line names the field or file; no folder is made for a run that cannot start."""
    out = tmp_path / "run"
    line = refused(mgrpo(*[str(out) if a == "OUT" else a for a in arguments]))
    assert expected in line
    assert not out.exists()


def test_a_folder_is_never_overwritten_by_accident(tmp_path: Path) -> None:
    """A run's folder needs --fresh or --resume; a folder that is no run is refused even with --fresh."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "already holds a run" in refused(mgrpo("train", ATLAS, "--out", str(tmp_path / "run")))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    line = refused(mgrpo("train", ATLAS, "--out", str(tmp_path / "thesis"), "--fresh"))
    assert "neither empty nor a run's folder" in line
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"


def test_a_missing_model_is_named_before_anything_runs(tmp_path: Path) -> None:
    """A policy path that does not exist ends the command with its name."""
    line = refused(
        mgrpo(
            "train", ATLAS, "--out", str(tmp_path / "run"),
            "--set", "agents.main.model=/no/such/model", "--set", "agents.main.sft.steps=0",
        )
    )  # fmt: skip
    assert "/no/such/model" in line


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU")
@pytest.mark.parametrize("place", ["policy", "engine"])
def test_a_missing_gpu_is_named_before_anything_runs(tmp_path: Path, place: str) -> None:
    """Device "cuda" where no driver is: the setting and what was looked for."""
    line = refused(
        mgrpo("train", ATLAS, "--out", str(tmp_path / "run"), "--set", f"agents.sub.{place}.device=cuda")
    )
    assert f'agents.sub.{place}.device is "cuda", but this machine has no GPU' in line
    assert not (tmp_path / "run").exists()


def test_an_occupied_port_is_named(tmp_path: Path) -> None:
    """The store's address is taken: one line with the address, and no process stays behind. The folder does not count
    as a run's, since nothing was trained: the next start gets as far."""
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    agents = [f"--set=agents.{r}.url=ipc://{tmp_path}/{r}" for r in ("main", "sub")]
    start = [
        "train",
        ATLAS,
        "--out",
        str(tmp_path / "run"),
        f"--set=store.url=tcp://127.0.0.1:{port}",
        *agents,
    ]
    try:
        run = tmp_path / "run"
        assert f"metrics port 127.0.0.1:{port}: " in refused(
            mgrpo(*start, f"--set=store.metrics_port={port}")
        )
        assert not list(run.iterdir())  # this one is known before anything is started or deleted
        for _ in range(2):
            assert f"127.0.0.1:{port}" in refused_last(mgrpo(*start))
        config, summary = (tmp_path / "run" / "config.json", tmp_path / "run" / "summary.json")
        summary.write_text('{"outcome": "finished", "heldout": {"final": 0.9}}')
        before = config.read_bytes(), summary.read_bytes()
        line = refused_last(mgrpo("train", "--resume", str(tmp_path / "run"), "--set", "eval.every=7"))
        assert f"127.0.0.1:{port}" in line
        assert (config.read_bytes(), summary.read_bytes()) == before  # the store has accepted nothing
    finally:
        socket.close(0)


def refused_last(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, (done.stdout, done.stderr)
    return done.stderr.strip().splitlines()[-1]


def test_a_corrupt_checkpoint_is_named(tmp_path: Path) -> None:
    """--resume of a run whose checkpoint is damaged ends with the file's name, not with a trace."""
    run = tmp_path / "run"
    folder = run / "agents" / "main" / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"step": 3, "crc32c": {".metadata": 0}}))
    (folder / ".metadata").write_bytes(b"x")
    from mgrpo.config import dump_config, load_config

    overrides = [f"agents.{role}.sft.steps=0" for role in ("main", "sub")]
    dump_config(load_config(Path(ATLAS), overrides), run / "config.json")
    done = mgrpo("train", "--resume", str(run))
    assert "step-00000003/.metadata" in refused_last(done)
