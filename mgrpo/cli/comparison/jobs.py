"""The runs of a comparison: as many at once as the machine takes, each a `mgrpo train` of its own, each resumed where
it stopped. The variants of a seed wait for its co-training run to finish SFT, and begin with those."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgrpo.cli.comparison.variants import Variant
from mgrpo.config import RunConfig, config_digest, load_config
from mgrpo.environments.comparison import COTRAIN
from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.metrics import read_metrics
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.interrupts import Interrupts
from mgrpo.run.supervisor import last_words

LAUNCHER_SECONDS = 60.0  # for a launcher to end, beside what its trainers may take to write their checkpoints


@dataclass(frozen=True)
class Job:
    """One run of the comparison. start: folder of the run whose start policies it begins with; None:
    it makes its own."""

    seed: int
    variant: Variant
    folder: Path
    start: Path | None

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.variant.name}"


def plan(out: Path, seeds: Sequence[int], chosen: Sequence[Variant]) -> list[Job]:
    """All jobs: of every seed the co-training run first, since the others wait for it."""
    every = [
        Job(
            seed, variant, run_folder(out, seed, variant.name),
            None if variant.name == COTRAIN or variant.own_start else run_folder(out, seed, COTRAIN),
        )
        for variant in chosen for seed in seeds
    ]  # fmt: skip
    # Runs with SFT of their own take longest, and others wait for co-training's.
    return sorted(every, key=lambda job: (job.variant.name != COTRAIN, job.start is not None))


def run_folder(out: Path, seed: int, variant: str) -> Path:
    return out / "runs" / f"seed-{seed}" / variant.replace(" ", "-")


def is_finished(folder: Path) -> bool:
    return _summary(folder).get("outcome") == "finished"


def run_all(
    config_path: Path, config: RunConfig, jobs: Sequence[Job], overrides: Sequence[str], at_once: int,
    log: Callable[[str], None],
) -> dict[str, str]:  # fmt: skip
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
                blocked = job.start is not None and not _has_start_policies(config.policy_roles, job.start)
                if blocked and _failed(job, failed):
                    failed[job.name] = "its seed's co-training run failed"
                    waiting.remove(job)
                elif not blocked and len(running) < at_once:
                    waiting.remove(job)
                    running[job.name] = (
                        job,
                        _start(config_path, config.policy_roles, job, overrides),
                        time.monotonic(),
                    )
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
        _stop([process for _, process, _ in running.values()], config.trainer.stop_timeout + LAUNCHER_SECONDS)
    return failed


def _failed(job: Job, failed: dict[str, str]) -> bool:
    return f"seed {job.seed}, {COTRAIN}" in failed


def _has_start_policies(policy_roles: Sequence[str], run: Path) -> bool:
    """Checkpoints and policies are renamed into place, so what exists is whole."""
    folder = RunFolder(run)
    return all((folder.agent(r) / "start" / "config.json").exists() for r in policy_roles) and (
        any(r.get("main/reward/mean") is not None for r in read_metrics(run)) or is_finished(run)
    )


def settings(policy_roles: Sequence[str], job: Job, overrides: Sequence[str]) -> list[str]:
    """The overrides that make a job's config of the comparison's."""
    sets = [*overrides, f"seed={job.seed}", *job.variant.overrides]
    if job.start is None:
        return sets
    for role in policy_roles:
        start = (RunFolder(job.start).agent(role) / "start").resolve()
        sets += [f"agents.{role}.model={json.dumps(str(start))}", f"agents.{role}.sft.steps=0"]
    return [*sets, "eval.start_validation=0", "eval.heldout=1"]  # the seed's co-training run was validated


def check(
    config_path: Path, policy_roles: Sequence[str], jobs: Sequence[Job], overrides: Sequence[str]
) -> None:
    """Raise ConfigError where a folder holds a run with other settings than this comparison's."""
    for job in jobs:
        if not RunFolder(job.folder).config.exists():
            continue
        wanted = load_config(config_path, settings(policy_roles, job, overrides))
        known = recorded_run(job.folder)
        if (config_digest(wanted), wanted.trainer.steps) != (config_digest(known), known.trainer.steps):
            raise ConfigError(f"{job.folder} holds a run with other settings; choose another --out")


def _start(
    config_path: Path, policy_roles: Sequence[str], job: Job, overrides: Sequence[str]
) -> subprocess.Popen[bytes]:
    sets = settings(policy_roles, job, overrides)
    arguments = ["train", str(config_path), "--out", str(job.folder), *(f"--set={s}" for s in sets)]
    if RunFolder(job.folder).config.exists():
        arguments = ["train", "--resume", str(job.folder)]
    log = _log(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "mgrpo", *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
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
