"""`mgrpo launch`: the plan's numbers, the files that SLURM, compose and Kubernetes get, and a run through them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mgrpo.cli import app
from mgrpo.cli.cluster.plan import Part, Plan, Site, make_plan
from mgrpo.cli.cluster.text import document
from mgrpo.config import config_digest, load_config
from mgrpo.engines.vllm.backend import gpus_of
from mgrpo.errors import ConfigError, MgrpoError
from tests.runs import RELAY, summary, wait_for

TEAM = """
[task]
name = "atlas"
[agents.main]
model = "MODEL"
max_length = 64
reward = { correct = 0.9 }
policy = { device = "cuda", ranks = 4 }
[agents.main.engine]
type = "vllm"
device = "cuda"
replicas = 2
sync = "fs"
python = "PYTHON"
arguments = ["--tensor-parallel-size", "2"]
[agents.sub]
model = "MODEL"
max_length = 96
reward = { outcome = 0.5, expert = 0.5 }
[trainer]
threads = 2
[rollout]
workers = 3
threads = 5
"""
HOSTS = ["--host", "main=n1", "--host", "sub=n2", "--host", "rollout=n3", "--host", "vllm-main=n4"]


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """A config with everything that makes parts: ranks, vLLM replicas, workers. Its model is an empty folder."""
    (tmp_path / "model").mkdir()
    path = tmp_path / "team.toml"
    path.write_text(TEAM.replace("MODEL", str(tmp_path / "model")).replace("PYTHON", sys.executable))
    return path


def launched(*arguments: str | Path) -> str:
    """What the command says; fails the test when it does not succeed."""
    result = CliRunner().invoke(app, ["launch", *map(str, arguments)])
    assert result.exit_code == 0, result.exception or result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    """The line that a mistake gets (tests/test_cli.py: every ConfigError is one line and status 2)."""
    result = CliRunner().invoke(app, ["launch", *map(str, arguments)])
    assert isinstance(result.exception, ConfigError | SystemExit), result.output
    return str(result.exception) if isinstance(result.exception, ConfigError) else result.output


def plan_of(config: Path, site: Site | None = None, *overrides: str) -> Plan:
    hosts = {"main": "n1", "sub": "n2"}
    return make_plan(config, overrides, site or Site(Path("/run"), "python", None, hosts, 5600, 8))


def by_name(plan: Plan) -> dict[str, Part]:
    return {part.name: part for part in plan.parts}


# -- the plan -----------------------------------------------------------------------------------------------


def test_the_plan_has_the_numbers_of_the_config(team: Path) -> None:
    """One trainer an agent with a GPU a rank, a server a replica, a worker a count; no port twice."""
    plan = plan_of(team)
    parts = by_name(plan)
    needs = {name: (part.host, part.gpus, part.cpus, part.ports) for name, part in parts.items()}
    assert needs == {
        "store": ("n1", 0, 1, (5600,)),
        "monitor": ("n1", 0, 1, ()),
        "vllm-main-0": ("n1", 2, 4, (5603,)),
        "vllm-main-1": ("n1", 2, 4, (5604,)),
        "trainer-main": ("n1", 4, 8, (5601,)),
        "trainer-sub": ("n2", 0, 2, (5602,)),
        **{f"rollout-{i}": ("n1", 0, 5, ()) for i in range(3)},
    }
    assert parts["trainer-main"].command[:7] == (
        "python", "-m", "mgrpo", "trainer", "/run/config.json", "--agent", "main",
    )  # fmt: skip
    assert "--tensor-parallel-size" in parts["vllm-main-1"].command
    assert parts["vllm-main-1"].environment["VLLM_SERVER_DEV_MODE"] == "1"
    started: set[str] = set()
    for part in plan.parts:  # the order of the parts is one in which they can be started
        assert set(part.after) <= started, part.name
        started.add(part.name)


def test_every_address_is_in_the_shared_config_and_does_not_change_the_run(team: Path) -> None:
    """Clients use names of hosts, servers bind everything at the same port; the digest is that of the original."""
    plan = plan_of(team)
    config, original = plan.config, load_config(team)
    assert config.store.url == "tcp://n1:5600"
    assert [config.agents[role].url for role in config.roles] == ["tcp://n1:5601", "tcp://n2:5602"]
    assert config.agents["main"].engine.urls == ("http://n1:5603", "http://n1:5604")
    assert config_digest(config) == config_digest(original)
    parts = by_name(plan)
    assert parts["store"].command[-2:] == ("--set", "store.url=tcp://*:5600")
    assert parts["trainer-sub"].command[-2:] == ("--set", "agents.sub.url=tcp://*:5602")


def test_addresses_of_the_config_stay(team: Path) -> None:
    """A url that is set keeps its host and port; servers that run already are not started again."""
    plan = plan_of(
        team, None, "store.url=tcp://10.0.0.9:7000", 'agents.main.engine.urls=["http://gpu:8000"]',
        "agents.main.engine.replicas=1",
    )  # fmt: skip
    assert plan.config.store.url == "tcp://10.0.0.9:7000"
    assert by_name(plan)["store"].ports == (7000,)
    assert plan.config.agents["main"].engine.urls == ("http://gpu:8000",)
    assert not any(part.is_server for part in plan.parts)


def test_roles_that_share_a_policy_have_one_trainer_with_an_address_each(tmp_path: Path) -> None:
    """The owner's trainer binds both ports; no job is made for the other role."""
    path = tmp_path / "shared.toml"
    path.write_text(
        '[agents.main]\nreward = { correct = 1.0 }\n[agents.sub]\nshares = "main"\nreward = { outcome = 1.0 }\n'
    )
    plan = make_plan(path, [], Site(Path("/run"), "python", None, {"main": "n1"}, 5600, 8))
    parts = by_name(plan)
    assert [name for name in parts if name.startswith("trainer")] == ["trainer-main"]
    assert parts["trainer-main"].ports == (5601, 5602)
    assert plan.config.agents["sub"].url == "tcp://n1:5602"


def test_gpus_of_a_server_are_the_product_of_its_parallel_sizes() -> None:
    assert gpus_of([]) == 1
    assert gpus_of(["--tensor-parallel-size=4", "-pp", "2", "--max-num-seqs", "64"]) == 8
    with pytest.raises(ConfigError, match="tensor-parallel-size x"):
        gpus_of(["--tensor-parallel-size", "x"])


def test_an_hf_engine_on_a_gpu_gives_the_workers_one(team: Path) -> None:
    """A weight transfer between GPUs does not: trainer and servers have theirs."""
    plan = plan_of(team, None, "agents.sub.engine.device=cuda")
    assert [part.gpus for part in plan.parts if part.name.startswith("rollout")] == [1, 1, 1]
    plan = plan_of(team, None, "agents.main.engine.sync=nccl")
    assert [part.gpus for part in plan.parts if part.name.startswith("rollout")] == [0, 0, 0]


# -- text ---------------------------------------------------------------------------------------------------


def test_a_document_is_read_as_it_was_by_json_and_by_yaml() -> None:
    """No string becomes a number, a truth value or a date; characters that YAML refuses are escaped."""
    tree = {
        "a": 'quote " and \\ and \n and \x7f \u2028 é 😀',
        "deep": {"er": {"v": [{"k": 1}, {"k": "no"}]}},
        "traps": ["no", "1e3", "0644", "2024-01-01", "null", ": #"],
        "none": None,
        "empty": [{}, []],
    }
    assert yaml.safe_load(document(tree)) == json.loads(document(tree)) == tree


# -- files --------------------------------------------------------------------------------------------------


def test_slurm_scripts_are_valid_and_say_what_each_job_needs(team: Path, tmp_path: Path) -> None:
    """bash reads every script; nodes and GPUs are those of the plan; the folder is a run's with its own keys."""
    out = tmp_path / "a run"  # with a space: nothing may break at it
    launched(team, "--out", out, "--target", "slurm", *HOSTS, "--sbatch=--partition=long")
    scripts = {path.name: path for path in (out / "launch").iterdir()}
    assert set(scripts) == {
        f"{name}.sh"
        for name in (
            "store", "monitor", "vllm-main-0", "vllm-main-1", "trainer-main", "trainer-sub", "rollout-0", "rollout-1",
            "rollout-2", "stop", "submit",
        )
    }  # fmt: skip
    for path in scripts.values():
        assert subprocess.run(["bash", "-n", path]).returncode == 0, path
        assert path.stat().st_mode & stat.S_IXUSR
    headers = {name: re.findall(r"^#SBATCH (.*)$", path.read_text(), re.M) for name, path in scripts.items()}
    assert {"--nodelist=n1", "--gpus-per-task=4", "--cpus-per-task=8", "--partition=long"} <= set(
        headers["trainer-main.sh"]
    )
    assert {"--nodelist=n4", "--gpus-per-task=2"} <= set(headers["vllm-main-1.sh"])
    assert not any("gpus" in line for line in headers["trainer-sub.sh"] + headers["rollout-0.sh"])
    assert load_config(out / "config.json").link.keys == str(out / "keys")
    assert (out / "keys" / "server.secret").stat().st_mode & 0o777 == 0o600
    names = {path.stem for path in (out / "keys").glob("*.key")}
    assert names == {"main", "sub", "worker", "launcher", "observer"}


def test_compose_has_a_service_a_part_and_no_gpu_twice(team: Path, tmp_path: Path) -> None:
    """Services find each other by name, and each has devices of its own."""
    out = tmp_path / "out"
    launched(team, "--out", out, "--target", "compose", "--image", "ours:1")
    services: dict[str, Any] = json.loads((out / "compose.json").read_text())["services"]
    names = list(services)
    assert len(names) == 9
    assert all(set(service.get("depends_on", [])) <= set(names) for service in services.values())
    taken = [
        number
        for service in services.values()
        for device in service.get("deploy", {})
        .get("resources", {})
        .get("reservations", {})
        .get("devices", [])
        for number in device["device_ids"]
    ]
    assert sorted(taken, key=int) == [str(i) for i in range(4 + 2 + 2)]
    assert services["trainer-main"]["image"] == "ours:1" != services["vllm-main-0"]["image"]
    assert f"{out}:/mgrpo" in services["store"]["volumes"]
    config = load_config(out / "config.json")
    assert config.store.url == "tcp://store:5600" and config.agents["sub"].url == "tcp://trainer-sub:5602"
    assert config.link.keys == "/mgrpo/keys"


def test_k8s_has_a_service_for_whatever_listens(team: Path, tmp_path: Path) -> None:
    """Each address of the config is a service, whose selector meets one workload's pods, at its port."""
    out = tmp_path / "out"
    launched(team, "--out", out, "--target", "k8s", "--claim", "big")
    documents = json.loads((out / "k8s.json").read_text())["items"]
    kinds = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(set(kinds)) == len(kinds) == 9 + 5
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    pods = {d["metadata"]["name"]: d["spec"]["template"] for d in documents if d["kind"] != "Service"}
    config = load_config(out / "config.json")
    urls = [config.store.url, *(a.url for a in config.agents.values()), *config.agents["main"].engine.urls]
    for url in urls:
        host, port = str(url).rpartition("/")[2].split(":")
        assert int(port) in [p["port"] for p in services[host]["ports"]]
        assert services[host]["selector"].items() <= pods[host]["metadata"]["labels"].items()
    limits = pods["trainer-main"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": 4}
    endless = {name for kind, name in kinds if kind == "Deployment"}
    assert endless == {"store", "vllm-main-0", "vllm-main-1"}


def test_dry_run_shows_the_plan_and_writes_nothing(team: Path, tmp_path: Path) -> None:
    shown = launched(team, "--out", tmp_path / "out", "--target", "slurm", *HOSTS, "--dry-run")
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert rows["trainer-main"][1:5] == ["n1", "5601", "4", "8"]
    assert rows["vllm-main-1"][1:5] == ["n4", "5604", "2", "4"]
    assert "tcp://n1:5600" in shown and "http://n4:5603" in shown
    assert not (tmp_path / "out").exists()


# -- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target", "cloud"], "cloud"),
        (["--target", "slurm"], "--host main=NODE"),
        (["--target", "slurm", *HOSTS, "--host", "judge=n1"], "--host judge=...: no such part"),
        (["--target", "slurm", *HOSTS, "--host", "main=n9"], "given twice"),
        (["--target", "slurm", "--host", "main"], "expected PART=NODE"),
        (["--target", "slurm", *HOSTS, "--gpus-per-node", "2"], "trainer-main needs 4 GPUs, a node has 2"),
        (["--target", "slurm", *HOSTS, "--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--target", "slurm", *HOSTS, "--port", "70000"], "port 70000"),
        (["--target", "slurm", *HOSTS, "--set", "rollout.workers=0"], "rollout.workers"),
        (["--target", "slurm", *HOSTS, "--sbatch", "long"], "--sbatch 'long'"),
        (["--target", "slurm", *HOSTS, "--submit", "--dry-run"], "nothing to --submit"),
        (["--target", "compose", "--host", "main=n1"], "--host has no effect"),
        (["--target", "compose", "--submit"], "--submit has no effect"),
        (["--target", "k8s", "--set", "store.url=tcp://10.0.0.1:1"], "store.url is set"),
        (["--target", "slurm", *HOSTS, "--set", "agents.main.model=/no/such"], "no folder /no/such"),
        (["--target", "slurm", *HOSTS, "--set", "agents.main.engine.python=/no/python"], "no interpreter /no/python"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_writes_nothing(
    team: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    """Before a folder or a job exists."""
    assert expected in refused(team, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_and_a_missing_sbatch_are_named(
    team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is overwritten, and nothing is written for jobs that cannot be handed in."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    assert "is not an empty folder" in refused(
        team, "--out", tmp_path / "thesis", "--target", "slurm", *HOSTS
    )
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused(team, "--out", tmp_path / "out", "--target", "slurm", *HOSTS, "--submit")
    assert "no sbatch on PATH" in line
    assert not (tmp_path / "out").exists()


# -- submitting ---------------------------------------------------------------------------------------------

SBATCH = """
# Writes down what it is asked for; with $RUN it also runs the job, as a process group of its own.
echo "$@" >> "$LOG"
n=$(wc -l < "$LOG")
[ -n "$REFUSE" ] && [ "$n" -ge "$REFUSE" ] && { echo "sbatch: error: no such partition" >&2; exit 1; }
if [ -n "$RUN" ] && [[ "$*" != *afterany* ]]; then
    for word in "$@"; do [[ "$word" == *.sh ]] && script=$word; done
    setsid bash "$script" > "$LOG.$script.txt" 2>&1 < /dev/null &
    echo $! >> "$LOG.pids"
fi
echo "$((100 + n));cluster"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """sbatch, srun and scancel that belong to the test; gives the file that sbatch writes its arguments to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fakes = {"sbatch": SBATCH, "srun": 'exec "$@"', "scancel": 'echo "$@" >> "$LOG.gone"'}
    for name, text in fakes.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    log = tmp_path / "sbatch.log"
    for name, value in (("LOG", str(log)), ("RUN", ""), ("REFUSE", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield log
    pids = Path(f"{log}.pids")
    for pid in pids.read_text().split() if pids.exists() else []:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(int(pid), number)
                wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"the end of {pid}", 10)
            except (ProcessLookupError, AssertionError):
                continue


def test_submit_hands_the_jobs_in_each_after_those_it_needs(team: Path, tmp_path: Path, slurm: Path) -> None:
    """The ids in the dependencies are those of the jobs before; stop comes after the monitor and gets the endless."""
    out = tmp_path / "out"
    shown = launched(team, "--out", out, "--target", "slurm", *HOSTS, "--submit")
    lines = [line.split() for line in slurm.read_text().splitlines()]
    ids = {next(w for w in line if w.endswith(".sh")): 101 + i for i, line in enumerate(lines)}
    assert list(ids) == [
        "store.sh", "monitor.sh", "vllm-main-0.sh", "vllm-main-1.sh", "trainer-main.sh", "trainer-sub.sh",
        "rollout-0.sh", "rollout-1.sh", "rollout-2.sh", "stop.sh",
    ]  # fmt: skip
    depends = {
        name: [w for w in line if w.startswith("--dep")] for name, line in zip(ids, lines, strict=True)
    }
    assert depends["store.sh"] == []
    assert depends["trainer-main.sh"] == ["--dependency=after:101"]
    assert depends["rollout-2.sh"] == ["--dependency=after:101:103:104:105:106"]
    assert depends["stop.sh"] == ["--dependency=afterany:102"]
    assert lines[-1][-3:] == ["101", "103", "104"]
    assert "trainer-sub: job 106" in shown


def test_a_job_that_is_refused_cancels_those_before_it(
    team: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch's own words are passed on, and no part of a run stays in the queue alone."""
    monkeypatch.setenv("REFUSE", "3")
    result = CliRunner().invoke(
        app, ["launch", str(team), "--out", str(tmp_path / "out"), "--target", "slurm", *HOSTS, "--submit"]
    )
    assert isinstance(result.exception, MgrpoError) and "no such partition" in str(result.exception)
    assert sorted(Path(f"{slurm}.gone").read_text().split()) == ["101", "102"]


def test_a_run_through_the_scripts_finishes(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every script as a process of its own on this machine, encrypted links, all parts by the shared TOML: the run ends
    by itself, and the monitor has written what `mgrpo train` writes."""
    monkeypatch.setenv("RUN", "yes")
    out, port = tmp_path / "run", free_port()
    hosts = [f"--host={role}=127.0.0.1" for role in ("main", "left", "right")]
    launched(
        RELAY,
        "--out",
        out,
        "--target",
        "slurm",
        *hosts,
        "--port",
        str(port),
        "--submit",
        "--set",
        "trainer.steps=4",
    )

    def logs() -> str:
        return "\n".join(p.read_text() for p in tmp_path.glob("sbatch.log.*.txt"))

    wait_for(lambda: (out / "summary.json").exists(), "the end of the run", 120)
    assert summary(out)["finished"] and summary(out)["valid"] and summary(out)["steps"] == 4, logs()
    for role in ("main", "left", "right"):
        wait_for(lambda role=role: (out / "agents" / role / "final").exists(), f"the policy of {role}", 30)
    wait_for(lambda: (out / "curves.png").exists(), "the picture", 30)
    assert "started" not in json.dumps(summary(out)["reason"]) and "(start 1 of" not in logs(), logs()


def free_port() -> int:
    """Start of a range of a few ports that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(int(probe.getsockname()[1]), 65_000)
