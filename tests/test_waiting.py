"""The one wait: what it returns, when its deadline counts anew, and what it raises. Time is a number here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mgrpo import waiting
from mgrpo.errors import ConfigError, DeadlineError
from mgrpo.waiting import wait_until


class Clock:
    """A time.monotonic and a time.sleep that only add."""

    def __init__(self) -> None:
        self.now, self.naps = 100.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    yield clock


def test_the_first_thing_that_is_ready_is_returned(clock: Clock) -> None:
    """None and False mean not yet; 0 and "" are answers. Pauses grow up to the bound."""
    answers = iter([None, False, None, None, 0])
    assert wait_until(lambda: next(answers), 5.0, lambda: "late", pause=0.004) == 0
    assert clock.naps == [0.001, 0.002, 0.004, 0.004]
    assert wait_until(lambda: "", 0.0, lambda: "late") == ""


def test_a_passed_deadline_is_the_named_error(clock: Clock) -> None:
    """After the seconds, not before, with the text as it is then, and of the given type."""
    looks = []
    with pytest.raises(DeadlineError, match=r"store: nothing in \d+ looks"):
        wait_until(lambda: looks.append(clock.now), 2.0, lambda: f"store: nothing in {len(looks)} looks")
    assert 102.0 < clock.now < 102.2
    with pytest.raises(ConfigError, match="locked"):
        wait_until(lambda: False, 2.0, lambda: "locked", error=ConfigError)


def test_progress_sets_the_deadline_anew(clock: Clock) -> None:
    """One step of progress every 0.9 seconds holds a deadline of one second off; the end of it does not."""
    with pytest.raises(DeadlineError):
        wait_until(lambda: None, 1.0, lambda: "late", progress=lambda: min(10, int((clock.now - 100) / 0.9)))
    assert 110.0 < clock.now < 110.2


def test_what_came_while_the_process_slept_is_taken(clock: Clock) -> None:
    """A process that was stopped for a minute looks once more before it calls its peer late."""

    def ready() -> bool:
        if clock.now < 160:
            clock.now += 60
            return False
        return True

    assert wait_until(ready, 1.0, lambda: "late")


def test_an_error_of_the_question_ends_the_wait(clock: Clock) -> None:
    """It is not taken for "not yet"."""

    def ready() -> bool:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        wait_until(ready, 5.0, lambda: "late")
    assert not clock.naps
