"""Servers as processes of a run: what can fail before anything runs, what they are started with, how they end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mgrpo
from mgrpo import _C
from mgrpo.config import load_config, view_of
from mgrpo.engines import process
from mgrpo.engines.backend import ServerCommand
from mgrpo.engines.process import run_server
from mgrpo.engines.vllm.backend import VllmBackend, plugin_variables
from mgrpo.errors import ConfigError
from mgrpo.model.policy import save_policy
from mgrpo.run import launch
from tests.models import tiny_policy
from tests.runs import RELAY, wait_for


def test_a_server_that_does_not_answer_ends_the_start_in_one_line(tmp_path: Path) -> None:
    """mgrpo train with the address of nobody: the setting and the address, before a folder or a process exists."""
    out = tmp_path / "run"
    sets = ['agents.left.engine={type="vllm", sync="fs", urls=["http://127.0.0.1:9"]}']
    with pytest.raises(ConfigError, match=r"^agents.left.engine.urls: http://127.0.0.1:9: .+") as error:
        launch.start(RELAY, out, sets, fresh=False)
    assert "\n" not in str(error.value) and not out.exists()
    sets = ['agents.left.engine={type="vllm", sync="fs"}']
    with pytest.raises(ConfigError, match=r"agents.left.model is missing"):
        launch.start(RELAY, out, sets, fresh=False)
    save_policy(tiny_policy("shift"), tmp_path / "model")
    sets = [
        f"agents.left.model={tmp_path}/model",
        'agents.left.engine={type="vllm", sync="fs", python="nowhere"}',
    ]
    with pytest.raises(ConfigError, match=r"agents.left.engine.python: no interpreter nowhere"):
        launch.start(RELAY, out, sets, fresh=False)
    with pytest.raises(ConfigError, match=r"agents.left.loss.temperature=3: vLLM samples at 0.01..2"):
        launch.start(RELAY, out, [*sets, "agents.left.loss.temperature=3.0"], fresh=False)
    assert not out.exists()


def test_what_a_server_is_started_with(tmp_path: Path) -> None:
    """The settings that make its log-probs those of the sampled distribution and its versions known, and the user's
    own arguments last."""
    sets = [
        f"agents.left.model={tmp_path}",
        f'agents.left.engine={{type="vllm", sync="lora", python="{sys.executable}", arguments=["--x", "1"]}}',
        "agents.left.policy.lora.rank=12",
    ]
    command = VllmBackend.command(view_of(load_config(RELAY, sets), "left"), "unix:///s")
    words = list(command.arguments)
    pairs = set(itertools.pairwise(words))
    assert {
        ("--logprobs-mode", "processed_logprobs"),
        ("--generation-config", "vllm"),
        ("--max-model-len", "32"),
        ("--max-lora-rank", "16"),
        ("--uds", "/s"),
    } <= pairs
    assert "--enable-scale-out" in words and words[-2:] == ["--x", "1"]
    assert command.variables["VLLM_SERVER_DEV_MODE"] == "1"


def test_a_started_server_finds_the_plugin_of_the_run_itself(tmp_path: Path) -> None:
    """In an environment where mgrpo is not installed: the very package of the run, core included, and nothing else of
    its folders."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/platforms.py").write_text(
        "class current_platform:\n    is_cpu = staticmethod(lambda: False)\n"
    )
    (tmp_path / "vllm/__init__.py").touch()
    found = Path(torch.__file__).parent.parent
    variables = plugin_variables(keep_plain=True)
    paths = [variables["PYTHONPATH"].split(os.pathsep)[0], str(tmp_path), str(found)]
    code = (
        "import mgrpo_plugin, sys; e = mgrpo_plugin.WorkerExtension; "
        "print(e.__module__, e.mgrpo_patch.__name__, sys.modules['mgrpo'].__file__, sys.modules['mgrpo._C'].__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # no site: what is installed here is not found
        env={**variables, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "mgrpo.engines.vllm.plugin.extension",
        "mgrpo_patch",
        str(mgrpo.__file__),
        str(_C.__file__),
    ]


FRONT_END = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(f"{child.pid}")
time.sleep(60)
"""
SUPERVISOR = """
import signal, sys
from pathlib import Path
from mgrpo.engines.backend import ServerCommand
from mgrpo.engines.process import run_server
def leave(*_): raise SystemExit(0)
signal.signal(signal.SIGTERM, leave)
sys.exit(run_server(ServerCommand([sys.executable, "-c", {front!r}, {mark!r}], {{}}), Path({socket!r})) + 100)
"""


@pytest.mark.parametrize("victim", ["front end", "supervisor"])
def test_no_process_of_a_server_outlives_it(tmp_path: Path, victim: str) -> None:
    """The front end killed: what it had started is ended too, and the status is the signal's. The supervisor gets
    SIGTERM: the same."""
    mark = tmp_path / "mark"
    code = SUPERVISOR.format(front=FRONT_END, mark=str(mark), socket=str(tmp_path / "s"))
    supervisor = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: mark.exists() and mark.read_text() != "", "the start", 60)
        engine = int(mark.read_text())
        front = int(Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(
            front if victim == "front end" else supervisor.pid,
            signal.SIGKILL if victim == "front end" else signal.SIGTERM,
        )
        assert supervisor.wait(20) == (100 - signal.SIGKILL if victim == "front end" else 0)
        wait_for(lambda: not _runs(engine), "the end of the engine", 10)
    finally:
        supervisor.kill()
        supervisor.wait(10)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_lives_without_listening_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A front end that has closed its socket and does not end by itself; one that has not begun to listen is left."""
    monkeypatch.setattr(process, "SILENT_SECONDS", 1.0)
    path = tmp_path / "s"
    program = (
        "import socket, time; time.sleep(2); s = socket.socket(socket.AF_UNIX); "
        f"s.bind({str(path)!r}); s.listen(); time.sleep(1); s.close(); time.sleep(600)"
    )
    assert run_server(ServerCommand([sys.executable, "-c", program], {}, 0), path) == -signal.SIGTERM
    assert not path.exists()
