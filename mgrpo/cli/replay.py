"""`mgrpo replay`: is what a run trained with what its record says? Stage by stage, bit by bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from mgrpo.errors import ConfigError
from mgrpo.pipeline.replay import DIFFERS, EQUAL, UNKNOWN, Replayer, Stage
from mgrpo.record.reader import Recording
from mgrpo.run.folder import RunFolder, recorded_run


def replay_run(run: Path, rollouts: Sequence[str], sample: int, seed: int) -> None:
    """Print a line a stage and end with status 1 when one differs, 3 when none differs but some were not recorded."""
    folder, config = RunFolder(run), recorded_run(run)
    recording = Recording([run])
    for note in recording.notes():
        print(f"note: {note}")
    if not recording.steps:
        raise ConfigError(f"{run}: the run has no record (record.enabled, or it has not trained a step yet)")
    chosen = list(rollouts) or _random_rollouts(recording, sample, seed)
    if not chosen:
        raise ConfigError("replay needs --rollout ID or --sample N")
    replayer = Replayer(config, recording, folder.agent)
    worst = EQUAL
    for rollout in chosen:
        stages = replayer.replay(rollout)
        if not stages:
            print(f"{rollout}: not trained on")
        for role in dict.fromkeys(stage.role for stage in stages):
            print(f"{rollout}  {role:<6}  " + verdict([s for s in stages if s.role == role]))
        found = {stage.status for stage in stages}
        worst = DIFFERS if DIFFERS in (worst, *found) else UNKNOWN if UNKNOWN in (worst, *found) else EQUAL
    if len(chosen) > 1:
        print(f"{len(chosen)} rollouts: {'every stage bit-equal' if worst == EQUAL else worst}")
    if worst != EQUAL:
        sys.exit(1 if worst == DIFFERS else 3)


def verdict(stages: Sequence[Stage]) -> str:
    """The stages of one role in one line, up to the first that differs."""
    words = []
    for stage in stages:
        if stage.status == EQUAL:
            words.append(f"{stage.name} =")
        elif stage.status == DIFFERS:
            words.append(
                f"{stage.name} DIFFERS: {stage.field}, training used {stage.recorded!s}, rebuilt {stage.rebuilt!s}"
            )
            break
        else:
            words.append(f"{stage.name} not recorded ({stage.field})")
    return "  ".join(words)


def _random_rollouts(recording: Recording, n: int, seed: int) -> list[str]:
    """n rollouts of training, in the order of their steps."""
    trained = [r.head for r in recording.rollouts.values() if r.head.split == "train"]
    drawn = random.Random(seed).sample(trained, min(n, len(trained)))
    return [head.id for head in sorted(drawn, key=lambda head: head.index)]
