"""The packer of csrc/ in plain Python: rules instead of data structures, the same sums in the same order."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

TIGHT, EVEN, SECOND_PLAN, RANK_SWAPS = 0.995, 1.0005, 1024, 8


@dataclass
class Bin:
    tokens: int = 0
    cost: float = 0.0
    members: list[int] = field(default_factory=list)  # positions
    segments: int = 0
    number: int = 0  # ties go to the bin that was opened first


@dataclass
class Sequences:
    """In canonical order: by decreasing length, then by index."""

    index: list[int]
    length: list[int]
    cost: list[float]
    segments: list[int]
    capacity: int
    max_segments: int

    def fits(self, b: Bin, p: int) -> bool:
        return (
            b.tokens + self.length[p] <= self.capacity and b.segments + self.segments[p] <= self.max_segments
        )

    def put(self, b: Bin, p: int) -> None:
        b.members.append(p)
        b.tokens += self.length[p]
        b.cost += self.cost[p]
        b.segments += self.segments[p]


@dataclass
class TwinPacking:
    bins: list[list[int]]  # [rank * n_mb + step] -> indices, ascending
    n_mb: int
    rank_cost: list[float]
    lockstep: float
    efficiency: float


def pack(
    lengths: list[int],
    capacity: int,
    dp: int,
    cost: tuple[float, float],
    max_segments: int,
    own_costs: list[float] | None = None,
    segments: list[int] | None = None,
) -> TwinPacking:
    """Of sequences, or of units of so many segments and of costs of their own."""
    index = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    length = [lengths[i] for i in index]
    costs = [cost[0] * x + cost[1] * x * x for x in map(float, length)]
    if own_costs is not None:
        costs = [own_costs[i] for i in index]
    counts = [segments[i] if segments is not None else 1 for i in index]
    s = Sequences(index, length, costs, counts, capacity, max_segments or 2**31 - 1)
    total = 0.0
    for c in costs:
        total += c
    full = best_fit_decreasing(s, [], set())
    n = -(-len(full) // dp) * dp
    steps, slowest = into_steps(s, full, dp)
    if dp > 1 and n <= SECOND_PLAN:
        second = heavy_then_even(s, n, dp, total)
        if second:
            other, other_slowest = into_steps(s, second, dp)
            if other_slowest < slowest:
                steps, slowest = other, other_slowest
    at = assign_ranks(steps, dp)
    bins = [sorted(index[p] for p in at[step][rank].members) for rank in range(dp) for step in range(len(at))]
    rank_cost = [0.0] * dp
    for step in at:
        for rank in range(dp):
            rank_cost[rank] += step[rank].cost
    lockstep = slowest / (total / dp) if total > 0 else 1.0
    efficiency = sum(lengths) / (n * capacity) if n else 1.0
    return TwinPacking(bins, n // dp, rank_cost, lockstep, efficiency)


def best_fit_decreasing(s: Sequences, bins: list[Bin], placed: set[int]) -> list[Bin]:
    rooms: dict[int, list[Bin]] = {}  # room -> bins, the last to come is the first to go
    for p in range(len(s.length)):
        if p in placed:
            continue
        fitting = [room for room in rooms if s.fits(rooms[room][-1], p)]
        if fitting:
            room = min(fitting)
            b = rooms[room].pop()
            if not rooms[room]:
                del rooms[room]
        else:
            b = Bin()
            bins.append(b)
        s.put(b, p)
        if b.tokens < s.capacity and b.segments < s.max_segments:
            rooms.setdefault(s.capacity - b.tokens, []).append(b)
    return bins


def heavy_then_even(s: Sequences, n: int, dp: int, total: float) -> list[Bin]:
    bins: list[Bin] = []
    placed: set[int] = set()
    rest = total
    while len(bins) + dp < n:
        left = [p for p in range(len(s.length)) if p not in placed]
        if not left or s.cost[left[0]] * (n - len(bins)) <= rest:
            break
        fresh = heavy_step(s, left, dp)
        for b in fresh:
            rest -= b.cost
            placed.update(b.members)
        bins += fresh
    left = [p for p in range(len(s.length)) if p not in placed]
    if sum(s.length[p] for p in left) <= TIGHT * s.capacity * (n - len(bins)):
        even = [Bin() for _ in range(n - len(bins))]
        for p in left:
            fitting = [b for b in even if s.fits(b, p)]
            if not fitting:
                break
            s.put(min(fitting, key=lambda b: b.cost), p)
        else:
            return bins + even
    best_fit_decreasing(s, bins, placed)
    return bins if len(bins) <= n else []


def heavy_step(s: Sequences, left: list[int], dp: int) -> list[Bin]:
    bins = [Bin() for _ in range(dp)]
    for b, p in zip(bins, left, strict=False):
        s.put(b, p)
    left = left[dp:]
    limit = bins[0].cost
    for b in bins:
        while b.members and b.segments < s.max_segments:
            fitting = [p for p in left if s.fits(b, p) and b.cost + s.cost[p] <= limit]
            if not fitting:
                break
            s.put(b, fitting[0])
            left.pop(bisect_left(left, fitting[0]))
    return bins


def into_steps(s: Sequences, bins: list[Bin], dp: int) -> tuple[list[list[Bin]], float]:
    bins = bins + [Bin() for _ in range(-len(bins) % dp)]
    for i, b in enumerate(bins):
        b.number = i
    order = sorted(range(len(bins)), key=lambda b: (-bins[b].cost, b))
    steps = [[bins[b] for b in order[i : i + dp]] for i in range(0, len(order), dp)]
    steps = [rebalance(s, step) for step in steps]
    slowest = 0.0
    for step in steps:
        slowest += max(b.cost for b in step)
    return steps, slowest


def rebalance(s: Sequences, step: list[Bin]) -> list[Bin]:
    cost = 0.0
    for b in step:
        cost += b.cost
    max_cost = max(b.cost for b in step)
    if max_cost * len(step) <= EVEN * cost or sum(b.tokens for b in step) > TIGHT * s.capacity * len(step):
        return step
    fresh = [Bin(number=b.number) for b in step]
    for p in sorted(p for b in step for p in b.members):
        fitting = [b for b in fresh if s.fits(b, p)]
        if not fitting:
            return step
        b = min(fitting, key=lambda b: b.cost)
        s.put(b, p)
        if b.cost >= max_cost:
            return step
    return fresh


def assign_ranks(steps: list[list[Bin]], dp: int) -> list[list[Bin]]:
    load = [0] * dp
    at: list[list[Bin]] = []
    for step in steps:
        ranks = sorted(range(dp), key=lambda r: (load[r], r))
        mine = sorted(step, key=lambda b: (-b.tokens, b.number))
        row = [mine[0]] * dp
        for rank, b in zip(ranks, mine, strict=True):
            row[rank] = b
            load[rank] += b.tokens
        at.append(row)
    for _ in range(RANK_SWAPS * dp):
        high = load.index(max(load))
        best = shift = 0
        where = other = -1
        for rank in range(dp):
            gap = load[high] - load[rank]
            for i, step in enumerate(at):
                moved = step[high].tokens - step[rank].tokens
                gain = min(moved, gap - moved)
                if gain > best:
                    best, shift, where, other = gain, moved, i, rank
        if where < 0:
            break
        at[where][high], at[where][other] = at[where][other], at[where][high]
        load[high] -= shift
        load[other] += shift
    return at
