"""A run on a virtual clock: workers, engines and a trainer as events, the run's rules and scheduler as they are.

Real are the store's rules (mgrpo/store/ledger.py, through bench/store_rules.py), the worker's scheduler and share of
the groups (mgrpo/pipeline/open_groups.py, mgrpo/pipeline/group_share.py) and, with `ranks`, the C++ batcher, whose plan
says how long the slowest rank of a step takes. Made up are the engines (sequences that decode together slow each other
down), the tools (they wait) and the trainer (tokens a second). One role is trained; reading, building and recording
cost nothing, as they run beside a step.

    outcome = Simulation(setup, work, RealStore(k, batch, max_lag)).run(seconds=3600)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bench.store_rules import StoreRules
from mgrpo import Batcher
from mgrpo.pipeline.group_share import GroupShare
from mgrpo.pipeline.open_groups import OpenGroups

Turns = Sequence[
    tuple[float, float]
]  # of one rollout: (tokens that the engine works for, seconds of the tool)
Work = Callable[[int], Sequence[Turns]]  # index of a group -> its rollouts
Mode = Literal["stream", "waves", "cut"]
ROLE = "main"


@dataclass(frozen=True, slots=True)
class Setup:
    """A run's sizes. Times in seconds.

    mode: "stream" keeps `slots` rollouts in flight; "waves" plays one step's share of a worker and waits for its
    slowest rollout; "cut" starts oversample x questions groups a step, takes the first to be complete and throws the
    rest away. engines: 0 leaves sampling out. decode: (a, b): n sequences of one engine take a + b n for one token
    each. train_rate: tokens a second of the whole trainer; 0: a step takes step_s alone. ranks: data-parallel ones,
    for the batcher. sync_s: from a version's publication until the workers have it."""

    questions: int
    group_size: int
    slots: int
    workers: int = 1
    mode: Mode = "stream"
    oversample: float = 1.25
    engines: int = 0
    decode: tuple[float, float] = (0.015, 1e-4)
    train_rate: float = 0.0
    context: float = 1.0
    step_s: float = 0.0
    deadline_s: float = math.inf
    sync_s: float = 0.0
    ranks: int = 0
    poll_s: float = 0.0


@dataclass(slots=True)
class Flight:
    """One rollout under way. versions: of every turn."""

    worker: _Worker
    index: int
    rollout: int
    turns: Turns
    start: float
    versions: list[int] = field(default_factory=list)
    end: float = -1.0
    failed: bool = False

    @property
    def tokens(self) -> int:
        return sum(int(tokens) for tokens, _ in self.turns)


@dataclass(slots=True)
class Outcome:
    """What happened. steps: (claimed at, trained at, seconds waited before). staleness: age of a token when it is
    trained -> tokens. oldest: age of a rollout's first token -> rollouts. lost: groups that were
    sampled and never trained on. failed: rollouts over their deadline or cut."""

    setup: Setup
    seconds: float = 0.0
    flights: list[Flight] = field(default_factory=list)
    steps: list[tuple[float, float, float]] = field(default_factory=list)
    staleness: Counter[int] = field(default_factory=Counter)
    oldest: Counter[int] = field(default_factory=Counter)
    lockstep: list[float] = field(default_factory=list)
    lost: int = 0

    @property
    def failed(self) -> int:
        return sum(f.failed for f in self.flights)

    def busy(self, first: float, last: float) -> float:
        """Share of the slots' time between two moments that held a rollout."""
        ends = ((f.start, f.end if f.end >= 0 else self.seconds) for f in self.flights)
        return busy_share(ends, self.setup.slots, first, last)

    def idle(self, first: float, last: float) -> float:
        """Share of the time between two moments that the trainer waited for groups."""
        spans = [(at - waited, at) for at, _, waited in self.steps]
        trained = self.steps[-1][1] if self.steps else 0.0
        spans.append((trained, self.seconds))  # for a step that did not come any more
        return busy_share(spans, 1, first, last)

    def steady(self, skip: int = 2) -> tuple[float, float]:
        """From the first rollout of step `skip` to the first of the last step."""
        if self.setup.mode == "cut":  # a step holds more groups than are trained on
            return self.steps[skip - 1][1], self.steps[-2][1]
        starts = ((f.index // self.setup.questions, f.start) for f in self.flights)
        return steady_part(starts, skip)


def busy_share(spans: Any, slots: int, first: float, last: float) -> float:
    """Share of `slots` x (last - first) that the spans (start, end) cover; the same function judges a real run."""
    inside = sum(max(0.0, min(end, last) - max(start, first)) for start, end in spans)
    return inside / (slots * (last - first)) if last > first else math.nan


def steady_part(starts: Any, skip: int) -> tuple[float, float]:
    """Of (step, start of a rollout) pairs: from the first of step `skip` to the first of the last step. The filling of
    the slots and their draining are left out, and strict waves are counted with whole waves."""
    earliest: dict[int, float] = {}
    for step, start in starts:
        earliest[step] = min(start, earliest.get(step, start))
    last = max(earliest)
    return earliest[min(skip, last)], earliest[last]


class Clock:
    """Virtual time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), call, arguments))

    def run(self, until: float, over: Callable[[], bool]) -> None:
        events = self._events
        while events and events[0][0] <= until and not over():
            self.now, _, call, arguments = heapq.heappop(events)
            call(*arguments)
        if not over():
            self.now = until if until < math.inf else self.now


class FakeEngine:
    """Sequences that decode together: with n of them each gets 1 / (a + b n) tokens a second."""

    def __init__(self, clock: Clock, decode: tuple[float, float]) -> None:
        self._clock, (self._a, self._b) = clock, decode
        self._served, self._at, self._due = 0.0, 0.0, math.inf
        self._running: list[tuple[float, int, Callable[..., None], Flight]] = []
        self._number = itertools.count()
        self.tokens = 0.0

    def generate(self, tokens: float, done: Callable[[Flight], None], flight: Flight) -> None:
        self._advance()
        heapq.heappush(self._running, (self._served + tokens, next(self._number), done, flight))
        self._plan()

    def _advance(self) -> None:
        n, now = len(self._running), self._clock.now
        if n:
            more = (now - self._at) / (self._a + self._b * n)
            self._served += more
            self.tokens += n * more
        self._at = now

    def _plan(self) -> None:
        """An event that comes too early looks again; only an earlier one has to be planned."""
        if self._running:
            n = len(self._running)
            left = max(0.0, self._running[0][0] - self._served) * (self._a + self._b * n)
            if self._clock.now + left < self._due - 1e-9:
                self._due = self._clock.now + left
                self._clock.after(left, self._wake, self._due)

    def _wake(self, due: float) -> None:
        if due != self._due:
            return
        self._due = math.inf
        self._advance()
        finished = []
        while self._running and self._running[0][0] <= self._served + 1e-6:
            finished.append(heapq.heappop(self._running))
        self._plan()
        for _, _, done, flight in finished:
            done(flight)


class _Worker:
    """Opens every workers-th group and plays it. version: of the weights in its engines."""

    def __init__(self, run: Simulation, number: int, slots: int, engine: FakeEngine | None) -> None:
        self.run, self.number, self.engine = run, number, engine
        self.groups = OpenGroups(slots)
        self.version = 0
        self.refused = False
        self._share = GroupShare(number, run.setup.workers)
        self._wave = 0  # groups that may still be opened in this wave
        self._wave_version = -1  # weights of the last wave
        self._work: dict[int, Sequence[Turns]] = {}
        self.flying: dict[tuple[int, int], Flight] = {}

    def fill(self) -> None:
        """Start what may start."""
        groups, versions = self.groups, {ROLE: self.version}
        while True:
            while self._wants() and self._open():
                pass
            place = groups.next(versions)
            if place is None:
                return
            index, rollout = place
            flight = Flight(self, index, rollout, self._work[index][rollout], self.run.clock.now)
            self.flying[place] = flight
            self.run.outcome.flights.append(flight)
            if self.run.setup.deadline_s < math.inf:
                self.run.clock.after(self.run.setup.deadline_s, self._expire, flight)
            self.turn(flight)

    def _wants(self) -> bool:
        if self.refused:
            return False
        if self.run.setup.mode == "stream":
            return self.groups.wants_group()
        if not len(self.groups) and not self._wave:
            if self.run.setup.mode == "cut" and self._wave_version == self.version:
                return False  # this step's groups are there, or were cut
            self._wave, self._wave_version = self.run.wave_groups(), self.version
        return self._wave > 0

    def _open(self) -> bool:
        index, setup = self._share.next(), self.run.setup
        least = self.run.rules.open(self.number, index, self.run.clock.now)
        if least is None:
            self.refused = True
            if setup.mode != "stream" and len(self.groups):
                self._wave = 0
            return False
        self._share.passed(index)
        self._wave -= 1
        self._work[index] = self.run.work(index)
        self.groups.add(index, range(setup.group_size), {ROLE: least})
        return True

    def turn(self, flight: Flight) -> None:
        if flight.failed:
            return
        number = len(flight.versions)
        if number == len(flight.turns):
            self._end(flight)
            return
        flight.versions.append(self.version)
        tokens, seconds = flight.turns[number]
        if self.engine is not None and tokens:
            self.engine.generate(tokens, self._sampled, flight)
        else:
            self.run.clock.after(seconds, self.turn, flight)

    def _sampled(self, flight: Flight) -> None:
        self.run.clock.after(flight.turns[len(flight.versions) - 1][1], self.turn, flight)

    def _expire(self, flight: Flight) -> None:
        if flight.end < 0:
            flight.failed = True
            self._end(flight)

    def _end(self, flight: Flight) -> None:
        index, rollout = flight.index, flight.rollout
        flight.end = self.run.clock.now
        del self.flying[index, rollout]
        if self.groups.ended(index, rollout):
            del self._work[index]
        self.run.ended(flight)
        self.fill()

    def cut(self) -> None:
        """Throw away whatever is in flight."""
        for (index, rollout), flight in list(self.flying.items()):
            flight.failed, flight.end = True, self.run.clock.now
            self.groups.ended(index, rollout)
        for index in list(self._work):
            self.groups.drop(index)
        self.flying.clear()
        self._work.clear()
        self._wave = 0


class Simulation:
    """One run. The trainer's steps are numbered from 0; version v is that after v steps."""

    def __init__(self, setup: Setup, work: Work, rules: StoreRules) -> None:
        self.setup, self.work, self.rules = setup, work, rules
        self.clock, self.outcome = Clock(), Outcome(setup)
        shares = [
            setup.slots // setup.workers + (i < setup.slots % setup.workers) for i in range(setup.workers)
        ]
        engines = [FakeEngine(self.clock, setup.decode) for _ in range(setup.engines)]
        self.engines = engines
        self.workers = [
            _Worker(self, i, share, engines[i % len(engines)] if engines else None)
            for i, share in enumerate(shares)
        ]
        self._played: dict[int, list[Flight]] = {}
        self._costs = StepCosts(setup.group_size, setup.ranks) if setup.ranks else None
        self._training, self._idle_since, self._looked = False, 0.0, -1.0
        self._steps = math.inf

    def run(self, seconds: float = math.inf, steps: float = math.inf) -> Outcome:
        """Until so much time has passed, or so many steps were taken."""
        self._steps = steps
        for worker in self.workers:
            worker.fill()
        self.clock.run(seconds, lambda: len(self.outcome.steps) >= steps)
        self.outcome.seconds = self.clock.now
        self.outcome.lost = self.rules.lost()
        return self.outcome

    def wave_groups(self) -> int:
        """Groups of one worker's wave."""
        share = max(1, self.setup.questions // self.setup.workers)
        return -int(-share * self.setup.oversample // 1) if self.setup.mode == "cut" else share

    def ended(self, flight: Flight) -> None:
        """A rollout is over."""
        if not flight.failed:
            self._played.setdefault(flight.index, []).append(flight)
        lost = self.rules.lost()
        if self.rules.ended(flight.worker.number, flight, self.clock.now):
            self._look()
        if self.rules.lost() != lost:
            self.clock.after(0.0, self._admit)

    def _look(self) -> None:
        """The trainer looks for its next groups, at most once in poll_s."""
        if self._training or self._looked >= self.clock.now:
            return
        if self.setup.poll_s:
            self._looked = self.clock.now + self.setup.poll_s
            self.clock.after(self.setup.poll_s, self._claim)
        else:
            self._claim()

    def _claim(self) -> None:
        self._looked = -1.0
        if self._training:
            return
        lost = self.rules.lost()
        groups = self.rules.claim(self.clock.now)
        if self.rules.lost() != lost:  # what was thrown away leaves room for others
            self.clock.after(0.0, self._admit)
        if groups is None:
            return
        now, step = self.clock.now, len(self.outcome.steps)
        played = [self._played.pop(index, []) for index in groups]
        for flight in itertools.chain.from_iterable(played):
            for version, (tokens, _) in zip(flight.versions, flight.turns, strict=True):
                self.outcome.staleness[step - version] += int(tokens) or 1
            self.outcome.oldest[step - flight.versions[0]] += 1
        if self.setup.mode == "cut":
            for worker in self.workers:
                worker.cut()
        self._training = True
        self.clock.after(self._step_seconds(step, played), self._trained, groups, now, now - self._idle_since)

    def _step_seconds(self, step: int, groups: Sequence[Sequence[Flight]]) -> float:
        if not self.setup.train_rate:
            return self.setup.step_s
        lengths = [[flight.tokens * self.setup.context for flight in flights] for flights in groups]
        slowest = self._costs.lockstep(step, lengths) if self._costs is not None else 1.0
        self.outcome.lockstep.append(slowest)
        return self.setup.step_s + slowest * sum(map(sum, lengths)) / self.setup.train_rate

    def _trained(self, groups: Sequence[int], claimed: float, waited: float) -> None:
        now, step = self.clock.now, len(self.outcome.steps)
        self.outcome.steps.append((claimed, now, waited))
        self.rules.trained(step, groups, now)
        self._training, self._idle_since = False, now
        self.clock.after(self.setup.sync_s, self._arrived, step + 1)
        self._look()

    def _arrived(self, version: int) -> None:
        for worker in self.workers:
            worker.version = version
        self._admit()

    def _admit(self) -> None:
        for worker in self.workers:
            worker.refused = False
            worker.fill()


class StepCosts:
    """How well the batcher divides a step's sequences among ranks: its own plan, over sequences of 1/64 of their real
    length, which keeps the plan's work per sequence and leaves out most of the copying."""

    SCALE, CAPACITY = 64, 32768 // 64

    def __init__(self, k: int, ranks: int) -> None:
        # The attention term of a cost is quadratic in the length: scaled with it.
        cost = (1.0, self.SCALE / 61440)
        self._k = k
        self._batcher = Batcher(
            k, 1, self.CAPACITY, ranks, cost=cost, overlong="truncate", arena_bytes=1 << 28
        )

    def lockstep(self, step: int, groups: Sequence[Sequence[float]]) -> float:
        """Time of the step's slowest rank over the mean of all. groups: of each, the tokens of its rollouts; of a
        rollout that failed, none."""
        k, rows = self._k, [len(group) for group in groups]
        lengths = np.array([tokens for group in groups for tokens in group])
        short = np.clip(lengths // self.SCALE, 1, self.CAPACITY).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(short)]).astype(np.int64)
        n, total = len(short), int(offsets[-1])
        names = [f"{step}/{number}" for number in range(len(groups))]
        rollouts = np.concatenate([np.arange(count, dtype=np.int32) for count in rows])
        self._batcher.add_many(
            [name for name, count in zip(names, rows, strict=True) for _ in range(count)],
            rollouts=rollouts, invocations=np.zeros(n, np.int32), traj_ids=np.arange(n), offsets=offsets,
            tokens=np.ones(total, np.int32), loss_mask=np.ones(total, np.uint8),
            logprobs=np.zeros(total, np.float32), advantages=np.ones(n, np.float32),
            policy_versions=np.zeros(n, np.int32),
        )  # fmt: skip
        for name, count in zip(names, rows, strict=True):
            for rollout in range(k):
                self._batcher.seal(name, rollout, int(rollout < count))
        found = float(self._batcher.plan(step, queries=names).lockstep)
        for name in names:
            self._batcher.drop(name)
        return found
