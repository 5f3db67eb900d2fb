"""The profiler of a process over the steps that [profile] names.

    with profiling(config.profile, "main-rank0", folder):       once a process
        ...
        begin_step(number, report) ... end_step(number)         around each RL step, counted from 1

It opens with the first of the steps that the process sees and closes after the last, or with the process. What cannot
be profiled or written is reported, and the run goes on. Without [profile] nothing is imported and nothing happens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mgrpo.config.profile import ProfileConfig
from mgrpo.errors import MgrpoError
from mgrpo.profiling import stages

if TYPE_CHECKING:  # a process that is not profiled, or that has no need of torch, does not import it
    from mgrpo.profiling.tools import Profiler

Report = Callable[[str], object]


def _to_log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class ProfileWindow:
    """One window of one process. To be used from one thread."""

    def __init__(self, config: ProfileConfig, name: str, folder: Path, looks: bool = True) -> None:
        """name: of the files, e.g. "main-rank0". looks: False for a process that only has to know when the window of
        others opens and closes. config.steps is set."""
        assert config.steps is not None, "no window without steps"
        self._config, self._name, self._folder, self._looks = config, name, folder, looks
        self.first, self.last = config.steps
        self._profiler: Profiler | None = None
        self._over = False
        self._seen = (0, 0)
        self._report: Report = _to_log

    def covers(self, step: int) -> bool:
        """Whether the window is to be open in this step."""
        return self.first <= step <= self.last

    def begin(self, step: int, report: Report | None = None) -> None:
        """`step` begins: open the window, or close one that did not see its last step end. report: takes lines for
        people until the window is closed; None: the process's log does."""
        if step > self.last:
            self.close()
        if not self.covers(step) or not self._looks or self._over:
            return
        self._report = report or _to_log
        if self._profiler is None:
            self._open(step)
        self._seen = (self._seen[0], step)

    def end(self, step: int) -> None:
        """`step` is over."""
        if step >= self.last:
            self.close()

    def close(self) -> None:
        """Write what there is. Idempotent; the window stays closed."""
        self._over = True
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        stages.show_to(None)
        first, last = self._seen
        name = f"{self._name}-steps-{first}-{last}"
        try:
            where = profiler.stop(self._folder, name)
        except Exception as error:  # of a library, a driver or a file system that is not ours
            self._say(f"the profile of {name} was not written: {error}")
        else:
            self._say(f"profile of steps {first} to {last}: {where}")

    def _open(self, step: int) -> None:
        from mgrpo.profiling.tools import open_profiler

        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # now: a profiler that runs has to be stopped
            profiler = open_profiler(self._config)
            profiler.start()
        except Exception as error:  # as in close()
            self._over = True
            self._say(f"{self._name} is not profiled: {error}")
            return
        self._profiler, self._seen = profiler, (step, step)
        stages.show_to(profiler.range)

    def _say(self, line: str) -> None:
        try:
            self._report(line)
        except MgrpoError as error:  # the run is about to end, perhaps, and nobody takes lines any more
            _to_log(f"{line} (not reported: {error})")


_window: ProfileWindow | None = None


@contextlib.contextmanager
def profiling(config: ProfileConfig, name: str, folder: Path, looks: bool = True) -> Iterator[None]:
    """Around the work of a process: its window, where `config` has steps; what is open at the end is written."""
    global _window
    if config.steps is None:
        yield
        return
    _window = window = ProfileWindow(config, name, folder, looks)
    try:
        yield
    finally:
        _window = None
        window._report = _to_log  # whoever took lines has gone
        window.close()


def covers(step: int) -> bool:
    """Whether a window is to be open in this step, in this process or in others of its trainer."""
    return _window is not None and _window.covers(step)


def begin_step(step: int, report: Report | None = None) -> None:
    """An RL step, counted from 1, begins; see ProfileWindow.begin()."""
    if _window is not None:
        _window.begin(step, report)


def end_step(step: int) -> None:
    """The RL step is over."""
    if _window is not None:
        _window.end(step)


def close_window() -> None:
    """No step comes any more: write what there is."""
    if _window is not None:
        _window.close()
