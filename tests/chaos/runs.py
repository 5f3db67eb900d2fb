"""Whole training runs whose processes are killed, all the time, at random."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mgrpo.store.database import Database
from tests.runs import (
    ROOT,
    command,
    final_weights,
    leftovers,
    processes_of,
    steps_of,
    summary,
    trained_ages,
    wait_for,
)

ATLAS = ROOT / "examples" / "atlas" / "atlas.toml"
ROLES = ("main", "sub")
QUESTIONS = 4
# The real task with less of everything, with SFT that is so long that rewards differ and there is something to learn.
SMALL = (
    *(f"agents.{role}.sft.{what}" for role in ROLES for what in ("steps=300", "batch_size=32")),
    f"trainer.questions={QUESTIONS}", "trainer.group_size=4", "trainer.checkpoint_every=2",
    "eval.every=1000", "eval.validation=4", "eval.heldout=4", "eval.start_validation=0",
)  # fmt: skip


class Launched:
    """A run's launcher that can be killed and told to go on."""

    def __init__(self, out: Path, steps: int, overrides: Sequence[str] = ()) -> None:
        self.out = out
        sets = [f"--set={o}" for o in (*SMALL, f"trainer.steps={steps}", *overrides)]
        self._first = command("train", str(ATLAS), "--out", str(out), *sets)
        self.process = self._start(self._first)

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self.out.parent / f"{self.out.name}.txt").open("ab") as log:
            return subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self, name: str) -> bool:
        """kill -9 of a process of the run by its name; False when it is between two lives."""
        if name == "launcher":
            self.process.kill()
            self.process.wait(10)
            wait_for(lambda: not processes_of(self.out), "the end of the launcher's children", 120)
            begun = (self.out / "config.json").exists()
            self.process = self._start(command("train", "--resume", str(self.out)) if begun else self._first)
            return True
        pid = processes_of(self.out).get(name)
        if pid is None:
            return False
        os.kill(pid, signal.SIGKILL)
        return True

    def finish(self, seconds: float) -> None:
        """Wait for the end; whatever happens, no process stays."""
        try:
            status = self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(60)
        assert status == 0, (self.out.parent / f"{self.out.name}.txt").read_text()[-2000:]


def kill_run(
    folder: Path, steps: int, seconds: float, every: float, seed: int, overrides: Sequence[str] = ()
) -> dict[str, object]:
    """Train undisturbed, then train with a kill -9 of a random process every few seconds, from step 1 on; compare."""
    quiet = Launched(folder / "quiet", steps, overrides)
    quiet.finish(900)
    rng = random.Random(seed)
    run = Launched(folder / "killed", steps, overrides)
    kills: Counter[str] = Counter()
    try:
        wait_for(lambda: steps_of(run.out) >= 1, "step 1", 600)
        while kills.total() < seconds / every and run.process.poll() is None:
            time.sleep(every)
            alive = sorted(processes_of(run.out))
            # The launcher takes all others along, so it is not killed as often as they are.
            victim = rng.choice(alive) if alive and rng.random() < 0.9 else "launcher"
            if run.process.poll() is None and run.kill(victim):
                kills[victim] += 1
    finally:
        run.finish(900)
    ledgers = [trained(out) for out in (quiet.out, run.out)]
    planned = {role: [(i // QUESTIONS, i) for i in range(steps * QUESTIONS)] for role in ROLES}
    return {
        "steps": summary(run.out)["steps"],
        "kills": kills.total(),
        "of": dict(kills),
        "each_group_once": ledgers[1] == ledgers[0] == planned,
        "bit_equal": final_weights(run.out) == final_weights(quiet.out),
        "learned": all(
            start(quiet.out, role) != weights for role, weights in final_weights(quiet.out).items()
        ),
        "oldest": max(trained_ages(run.out)),  # steps that a trained token was old
        "left_behind": leftovers(run.out),
    }


def start(out: Path, role: str) -> bytes:
    """The weights that RL began with."""
    return (out / "agents" / role / "start" / "model.safetensors").read_bytes()


def trained(out: Path) -> dict[str, list[tuple[int, int]]]:
    """(step, index) of every group in each role's surviving optimizer history, as the store's file has it."""
    database = Database(out / "store.db")
    try:
        return {role: [(step, index) for _, step, _, index, _ in database.trained(role)] for role in ROLES}
    finally:
        database.close()
        Path(f"{database.path}.lock").unlink()
