"""The runs of a comparison: as many at once as the machine takes, each a `mgrpo train` of its own, each resumed where
it stopped. The variants of a seed wait for the start validation of its co-training run, and begin with its policies."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mgrpo.cli.comparison.variants import Variant, single_agent
from mgrpo.cli.evaluate import policy_path
from mgrpo.config import RunConfig, config_digest, dump_config, load_config
from mgrpo.environments.comparison import COTRAIN
from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.metrics import read_metrics
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.interrupts import Interrupts
from mgrpo.run.processes import load_run_task
from mgrpo.run.supervisor import last_words
from mgrpo.types import MAIN

LAUNCHER_SECONDS = 60.0  # for a launcher to end, beside what its trainers may take to write their checkpoints


@dataclass(frozen=True)
class Basis:
    """What all runs of a comparison have in common. config: what the file `path` says with the overrides. origin: role
    -> policy that every variant begins with (--from). repeats: of every named evaluation set; None: as the config has
    them."""

    path: Path
    config: RunConfig
    overrides: Sequence[str]
    out: Path
    origin: Mapping[str, Path] = field(default_factory=dict)
    repeats: int | None = None

    def has_start(self, role: str) -> bool:
        """Whether it is known before any run which policy `role` begins with."""
        return role in self.origin or self.config.agents[role].model is not None

    def settings(self) -> list[str]:
        """Overrides that every run has, beside those of the command line."""
        sets = enumerate(self.config.eval.sets)
        repeated = [number for number, s in sets if self.repeats is not None and not s.greedy]
        return [f"eval.sets.{number}.repeats={self.repeats}" for number in repeated]


@dataclass(frozen=True)
class Job:
    """One run of the comparison: `mgrpo train` of `config` with `sets`. start: folder of the run that it waits for,
    whose start policies it begins with where they are not known before; None: it validates its own."""

    seed: int
    variant: Variant
    folder: Path
    start: Path | None
    config: Path
    sets: Sequence[str]

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.variant.name}"

    def arguments(self) -> list[str]:
        """Of the program mgrpo: a new run, or the rest of the one in the folder."""
        if RunFolder(self.folder).config.exists():
            return ["train", "--resume", str(self.folder)]
        return ["train", str(self.config), "--out", str(self.folder), *(f"--set={s}" for s in self.sets)]


def plan(basis: Basis, seeds: Sequence[int], chosen: Sequence[Variant]) -> list[Job]:
    """All jobs: of every seed the co-training run first, since the others wait for it."""
    every = [_job(basis, seed, variant) for variant in chosen for seed in seeds]
    # Runs with SFT of their own take longest, and others wait for co-training's.
    return sorted(every, key=lambda job: (job.variant.name != COTRAIN, job.start is not None))


def _job(basis: Basis, seed: int, variant: Variant) -> Job:
    own = variant.name == COTRAIN or variant.own_start
    start = None if own else run_folder(basis.out, seed, COTRAIN)
    # The config of a single agent is a file of its own, which has the overrides in it.
    config = single_config(basis.out) if variant.alone else basis.path
    sets = [
        *([] if variant.alone else basis.overrides),
        f"seed={seed}",
        *variant.overrides,
        *basis.settings(),
    ]
    for role in (MAIN,) if variant.only_main else basis.config.policy_roles:
        policy = basis.origin.get(role)
        if policy is None and start is not None and not basis.has_start(role):
            policy = (RunFolder(start).agent(role) / "start").resolve()
        if policy is not None:
            sets += [f"agents.{role}.model={json.dumps(str(policy))}", f"agents.{role}.sft.steps=0"]
    if start is not None:  # the seed's co-training run was validated
        sets += ["eval.start_validation=0", "eval.heldout=1"]
    return Job(seed, variant, run_folder(basis.out, seed, variant.name), start, config, sets)


def final_policies(run: Path, config: RunConfig) -> dict[str, Path]:
    """Policy role of `config` -> its policy after RL in the folder of a run. Raises ConfigError naming a role that the
    run has none of."""
    recorded, found = recorded_run(run), {}
    for role in config.policy_roles:
        path = policy_path(recorded, RunFolder(run), role, "final") if role in recorded.agents else None
        if path is None:
            missing = RunFolder(run).agent(role) / "final"
            raise ConfigError(f"--from {run}: no policy of {role!r} after RL ({missing} does not exist)")
        found[role] = path.resolve()
    return found


def single_config(out: Path) -> Path:
    """The config of the variant "single", which leaves roles out and so is no set of overrides."""
    return out / "single.json"


def refused(basis: Basis, task: Task, chosen: Sequence[Variant]) -> dict[str, str]:
    """Variants that this config and task cannot have -> why. Writes the config of a single agent."""
    reasons = {}
    for variant in chosen:
        try:
            if variant.alone:
                config = single_agent(basis.config, task)
                load_run_task(config)
                basis.out.mkdir(parents=True, exist_ok=True)
                dump_config(config, single_config(basis.out))
            job = _job(basis, 1, variant)
            plain = _job(basis, 1, replace(variant, overrides=()))
            wanted = load_config(job.config, job.sets)
            if variant.overrides and wanted == load_config(plain.config, plain.sets):
                raise ConfigError("the config is that variant already")
        except ConfigError as error:
            reasons[variant.name] = str(error)
    return reasons


def run_folder(out: Path, seed: int, variant: str) -> Path:
    return out / "runs" / f"seed-{seed}" / variant.replace(" ", "-")


def is_finished(folder: Path) -> bool:
    return _summary(folder).get("outcome") == "finished"


def run_all(basis: Basis, jobs: Sequence[Job], at_once: int, log: Callable[[str], None]) -> dict[str, str]:
    """Run what is not finished; returns the reason of each job that failed, by its name. A start that is not valid
    is such a reason, and so is waiting for one. Leaves no process behind."""
    waiting = [job for job in jobs if not is_finished(job.folder)]
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    failed: dict[str, str] = {}
    if len(waiting) < len(jobs):
        log(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already")
    try:
        while waiting or running:
            for job in list(waiting):
                blocked = job.start is not None and not _has_start(basis, job.start)
                if blocked and _failed(job, failed):
                    failed[job.name] = "its seed's co-training run failed"
                    waiting.remove(job)
                elif not blocked and len(running) < at_once:
                    waiting.remove(job)
                    running[job.name] = (job, _start(job), time.monotonic())
                    log(f"{job.name}: started in {job.folder}")
            for name, (job, process, began) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                took = f"{time.monotonic() - began:.0f} s"
                if is_finished(job.folder):
                    log(f"{name}: finished, {took}; {len(waiting) + len(running)} runs to go")
                else:
                    failed[name] = _summary(job.folder).get("reason") or last_words(_log(job))
                    log(f"{name}: failed after {took}: {failed[name]}")
            time.sleep(0.2)
    finally:
        _stop(
            [process for _, process, _ in running.values()],
            basis.config.trainer.stop_timeout + LAUNCHER_SECONDS,
        )
    return failed


def _failed(job: Job, failed: dict[str, str]) -> bool:
    return f"seed {job.seed}, {COTRAIN}" in failed


def _has_start(basis: Basis, run: Path) -> bool:
    """Whether a co-training run has validated the policies that it starts from, and made those that were not known.
    Policies are renamed into place, so what exists is whole."""
    folder = RunFolder(run)
    made = [role for role in basis.config.policy_roles if not basis.has_start(role)]
    return all((folder.agent(r) / "start" / "config.json").exists() for r in made) and (
        any(r.get("main/reward/mean") is not None for r in read_metrics(run)) or is_finished(run)
    )


def check(jobs: Sequence[Job]) -> None:
    """Raise ConfigError where a folder holds a run with other settings than this comparison's."""
    for job in jobs:
        if not RunFolder(job.folder).config.exists():
            continue
        wanted, known = load_config(job.config, job.sets), recorded_run(job.folder)
        if (config_digest(wanted), wanted.trainer.steps) != (config_digest(known), known.trainer.steps):
            raise ConfigError(f"{job.folder} holds a run with other settings; choose another --out")
        if _repeats(wanted) != _repeats(known):
            raise ConfigError(
                f"{job.folder} holds a run with other repeats of its evaluation sets; choose another --out"
            )


def _repeats(config: RunConfig) -> dict[str, int]:
    return {s.name: s.repeats for s in config.eval.sets}


def described(job: Job) -> str:
    """A job as `--dry-run` shows it: its state, what it waits for, its command."""
    if is_finished(job.folder):
        return f"{job.name}: finished"
    begun = "goes on" if RunFolder(job.folder).config.exists() else "new"
    after = "" if job.start is None else f", after the start validation of {job.start}"
    return f"{job.name}: {begun}{after}\n  {shlex.join(['mgrpo', *job.arguments()])}"


def _start(job: Job) -> subprocess.Popen[bytes]:
    log = _log(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "mgrpo", *job.arguments()], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip


def _stop(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """A launcher that gets SIGTERM ends its own processes and leaves a run that can be resumed; at another Ctrl-C it
    gets another one, and ends them at once."""
    deadline, forwarded = time.monotonic() + seconds, -1
    with Interrupts() as interrupts:
        while left := [process for process in processes if process.poll() is None]:
            for process in left:
                if interrupts.count > forwarded:
                    process.terminate()
                if time.monotonic() > deadline:
                    process.kill()
                    process.wait(10)
            forwarded = interrupts.count
            time.sleep(0.1)


def _log(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.log")


def _summary(folder: Path) -> dict[str, str]:
    try:
        summary: dict[str, str] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary


def side_by_side() -> int:
    """Runs at once: in synchronous mode a run keeps about one core busy."""
    return max(1, len(os.sched_getaffinity(0)))


def need(failed: dict[str, str]) -> None:
    """Raise MgrpoError when nothing can be compared."""
    lost = [name for name in failed if name.endswith(COTRAIN)]
    if lost:
        raise MgrpoError(f"{lost[0]}: {failed[lost[0]]}")
