"""What a run shows while it works: a line an agent and step, and a bar with the time left when it is a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mgrpo.run.text import clean


class Display:
    """Plain lines when the output is a file or a pipe; a live bar below the lines in a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._marks: dict[str, tuple[float, float]] = {}  # phase -> (time, done) at its first report
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            )
            self._bar.start()

    def line(self, text: str, style: str = "") -> None:
        stamp = f"{time.monotonic() - self._began:6.1f}s"
        self.console.print(f"[dim]{stamp}[/dim]  {escape(clean(text))}", style=style)

    def advance(self, phase: str, done: float, total: float) -> str:
        """Move the bar of a phase; returns the time left as text ("" while unknown)."""
        now = time.monotonic()
        began, at = self._marks.setdefault(phase, (now, done))
        left = ""
        if done > at:
            left = f"{clock((total - done) * (now - began) / (done - at))} left"
        if self._bar is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bar.add_task(phase, total=total, left="")
            self._bar.update(self._tasks[phase], completed=done, left=left, visible=done < total)
        return left

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def step_line(role: str, step: int, steps: int, values: Mapping[str, Any], left: str) -> str:
    """One step of one agent in one line."""

    def show(name: str, label: str, form: str = ".3f") -> str:
        value = values.get(f"{role}/{name}")
        return "" if value is None else f"  {label} {value:{form}}"

    return (
        f"step {step:>4}/{steps}  {role:<6}"
        + show("reward/mean", "reward")
        + show("reward/correct", "correct", ".2f")
        + show("reward/expert", "expert", ".2f")
        + show("d_k/mean", "d_k", ".2f")
        + show("advantage/frac_zero", "zero-adv", ".2f")
        + show("policy/entropy", "entropy", ".2f")
        + show("loss/clip_ratio_high", "clip-hi", ".3f")
        + show("staleness/max", "lag", ".0f")
        + show("time/step", "", ".2f")
        + "s"
        + (f"  ({left})" if left else "")
    )


def clock(seconds: float) -> str:
    """Minutes and seconds as m:ss."""
    whole = int(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"
