"""What `mgrpo launch` does: look at everything that can fail, show the plan, write the folder, hand in the jobs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mgrpo.cli.cluster.compose import compose
from mgrpo.cli.cluster.k8s import k8s
from mgrpo.cli.cluster.plan import Plan, Site, make_plan
from mgrpo.cli.cluster.slurm import scripts
from mgrpo.config import dump_config
from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.run.folder import RunFolder
from mgrpo.run.processes import check_plugins, load_run_task
from mgrpo.transport.keys import add_key, init_keys

MOUNT = Path("/mgrpo")  # the run's folder inside containers
SUBMIT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for on the command line."""

    config: Path
    out: Path
    target: str
    overrides: Sequence[str]
    hosts: Sequence[str]
    sbatch: Sequence[str]
    image: str
    vllm_image: str
    claim: str
    port: int
    gpus_per_node: int
    submit: bool


def launch(order: Order, dry_run: bool) -> None:
    """Raises ConfigError before anything is written or started."""
    _check_options(order)
    plan = make_plan(order.config, order.overrides, _site(order))
    _check_run(order, plan)
    _show(plan)
    if dry_run:
        return
    texts = _texts(order, plan)
    _write(order.out, plan, texts)
    print(f"wrote {order.out}: config.json, {', '.join(sorted(texts))}")
    print(_next(order))
    if order.submit:
        _submit(order.out / "launch" / "submit.sh")


def _site(order: Order) -> Site:
    if order.target == "slurm":
        return Site(
            order.out.resolve(), sys.executable, None, _hosts(order.hosts), order.port, order.gpus_per_node
        )
    return Site(MOUNT, "python3", "python3", None, order.port, order.gpus_per_node)


def _hosts(given: Sequence[str]) -> Mapping[str, str]:
    hosts: dict[str, str] = {}
    for text in given:
        place, equals, node = text.partition("=")
        if not equals or not place or not node or any(c.isspace() or c in "\"'/:," for c in node):
            raise ConfigError(f"--host {text}: expected PART=NODE, e.g. --host main=node7")
        if hosts.setdefault(place, node) != node:
            raise ConfigError(f"--host {place}=...: given twice, as {hosts[place]} and {node}")
    return hosts


def _check_options(order: Order) -> None:
    if order.gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node {order.gpus_per_node}: expected 1 or more")
    for name, given in (("--host", order.hosts), ("--sbatch", order.sbatch), ("--submit", order.submit)):
        if given and order.target != "slurm":
            raise ConfigError(f"{name} has no effect with --target {order.target}, only with slurm")
    for option in order.sbatch:
        if not option.startswith("-") or "\n" in option:
            raise ConfigError(f"--sbatch {option!r}: expected an option of sbatch, e.g. --partition=gpu")
    if order.submit and shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: no sbatch on PATH; without --submit the scripts are written, to be submitted elsewhere"
        )


def _check_run(order: Order, plan: Plan) -> None:
    """What can be known to fail fails here, before a folder or a job exists."""
    if order.out.exists() and (not order.out.is_dir() or any(order.out.iterdir())):
        raise ConfigError(f"{order.out} is not an empty folder; choose another --out")
    check_plugins(plan.config)
    load_run_task(plan.config)
    for role, agent in plan.config.agents.items():
        if agent.model is not None and order.target != "k8s" and not Path(agent.model).is_dir():
            raise ConfigError(f"agents.{role}.model: no folder {agent.model}")
        if agent.model is not None and order.target == "compose" and not Path(agent.model).is_absolute():
            raise ConfigError(f"agents.{role}.model: containers need an absolute path, not {agent.model}")
    if order.target == "slurm":
        for part in plan.parts:
            if part.is_server and shutil.which(part.command[0]) is None:
                raise ConfigError(
                    f"{part.name}: no interpreter {part.command[0]} (agents.<role>.engine.python)"
                )


def _show(plan: Plan) -> None:
    """The plan as a table; lines are not cut where the output is no terminal."""
    table = Table(box=None, pad_edge=False)
    for title in ("part", "host", "ports", "GPUs", "CPUs", "after", "command"):
        table.add_column(title, justify="right" if title in ("GPUs", "CPUs") else "left", no_wrap=True)
    for part in plan.parts:
        ports, after = " ".join(map(str, part.ports)), " ".join(part.after)
        table.add_row(
            part.name, part.host, ports, str(part.gpus), str(part.cpus), after, " ".join(part.command)
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    console.print(table)
    config, link = plan.config, plan.config.link
    print(f"store {config.store.url}")
    for role in config.roles:
        urls = ", ".join(config.agents[role].engine.running_servers)
        print(f"{role} {config.agents[role].url}" + (f", rollouts by {urls}" if urls else ""))
    print("links: plain, anyone who reaches the ports can read and write the run" if link.insecure and not link.keys
          else f"links: encrypted, keys in {link.keys}")  # fmt: skip


def _texts(order: Order, plan: Plan) -> Mapping[str, str]:
    """Name below the run's folder -> text."""
    if order.target == "compose":
        return {"compose.json": compose(plan, order.out, order.image, order.vllm_image)}
    if order.target == "k8s":
        return {"k8s.json": k8s(plan, order.image, order.vllm_image, order.claim)}
    return {f"launch/{name}": text for name, text in scripts(plan, order.sbatch).items()}


def _write(out: Path, plan: Plan, texts: Mapping[str, str]) -> None:
    folder = RunFolder(out)
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
        if str(plan.config.link.keys) == str(plan.site.root / "keys"):
            _make_keys(out / "keys", plan)
        dump_config(plan.config, folder.config)  # every part's, with every address
        for name, text in texts.items():
            path = out / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if path.suffix == ".sh" else 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None


def _make_keys(folder: Path, plan: Plan) -> None:
    init_keys(folder)
    for name in ("launcher", "observer", "worker"):
        add_key(folder, name, name)
    for role in plan.config.roles:
        add_key(folder, role, f"trainer:{role}")


def _next(order: Order) -> str:
    if order.target == "compose":
        file = order.out / "compose.json"
        return (
            f"start: docker compose -f {file} up -d && docker compose -f {file} wait monitor; "
            f"docker compose -f {file} down"
        )
    if order.target == "k8s":
        return f"copy {order.out} to the volume of {order.claim}, then: kubectl apply -f {order.out / 'k8s.json'}"
    return f"start: {order.out / 'launch' / 'submit.sh'}"


def _submit(script: Path) -> None:
    try:
        done = subprocess.run(
            [str(script)], capture_output=True, text=True, timeout=SUBMIT_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise MgrpoError(f"{script}: sbatch did not answer within {SUBMIT_SECONDS:g} s") from None
    print(done.stdout, end="")
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise MgrpoError(f"{script}: {words[-1] if len(words) == 1 else ' / '.join(words)}")
