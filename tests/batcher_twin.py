"""mgrpo.Batcher in plain Python, written from docs/alignment.md: slow, obvious, and bit for bit the same
results."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.pack_twin import pack

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


# -- the generator
# ---------------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK32, (a >> 32) ^ c[3] ^ k[1], a & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


def fnv1a64(text: str) -> int:
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK64
    return h


class Stream:
    """32-bit words of one (seed, step, query, rollout, role)."""

    def __init__(self, seed: int, step: int, query: str, rollout: int, role: str) -> None:
        q, r = fnv1a64(query), fnv1a64(role)
        self.key = philox([q & MASK32, q >> 32, r & MASK32, r >> 32], [seed & MASK32, seed >> 32])[:2]
        self.counter = [0, rollout, step & MASK32, step >> 32]
        self.words: list[int] = []

    def next(self) -> int:
        if not self.words:
            self.words = philox(self.counter, self.key)
            self.counter[0] += 1
        return self.words.pop(0)

    def bounded(self, n: int) -> int:
        """Uniform in [0, n): a word that falls into the incomplete last stretch is drawn again."""
        while True:
            product = self.next() * n
            if product & MASK32 >= (2**32 - n) % n:
                return product >> 32

    def subset(self, d: int, take: int) -> list[int]:
        order = list(range(d))
        for i in range(take):
            j = i + self.bounded(d - i)
            order[i], order[j] = order[j], order[i]
        return order[:take]


def multiplicities(stream: Stream, d: int, d_max: int, mode: str) -> list[int]:
    if mode == "none" or (mode == "expected" and d <= d_max):
        return [1] * d
    if d > d_max:
        kept = stream.subset(d, d_max)
        return [int(i in kept) for i in range(d)]
    if d == 0:
        return []
    extra = stream.subset(d, d_max % d)
    return [d_max // d + (i in extra) for i in range(d)]


def weight_of(m: int, d: int, d_max: int, mode: str, sequence_weight: str) -> float:
    if mode in ("weights", "duplicate"):
        return m / d_max
    if mode == "expected":
        return 1 / min(d, d_max)
    return 1 / d if sequence_weight == "per_rollout" else 1.0


@dataclass
class Row:
    group: int
    role: int
    rollout: int
    invocation: int
    segment: int
    multiplicity: int
    weight: float
    item: dict[str, Any]

    @property
    def trained(self) -> np.ndarray:
        """Advantages of the tokens with loss_mask 1."""
        return self.item["advantages"][self.item["mask"] == 1]

    @property
    def advantage(self) -> np.float32:
        per_token = self.item["per_token"]
        return np.float32(sum(map(float, self.trained)) / len(self.trained)) if per_token else self.trained[0]


# -- the batcher
# -----------------------------------------------------------------------------------------------


def natural(name: str) -> list[tuple[int, int, bytes]]:
    """Sort key of a query: digits as numbers, before any other byte they are not compared with."""
    parts = re.findall(rb"\d+|\D", name.encode())
    return [(48, int(p), b"") if p.isdigit() else (p[0], 0, b"") for p in parts]


class TwinBatcher:
    def __init__(self, options: dict[str, Any]) -> None:
        self.o = options
        self.entries: dict[tuple[str, int, int], dict[int, list[dict[str, Any]] | None]] = {}
        self.sealed: dict[tuple[str, int, int], int] = {}

    def add(
        self, query: str, rollout: int, invocation: int, traj_id: int, tokens: Any, loss_mask: Any,
        logprobs: Any, advantage: Any, policy_version: int, role: str, segment_starts: Any = (0,),
    ) -> None:  # fmt: skip
        place = self.entries.setdefault((query, self.o["roles"].index(role), rollout), {})
        bounds = list(itertools.pairwise([*segment_starts, len(tokens)]))
        if any(end - start > self.o["capacity"] for start, end in bounds) and self.o["overlong"] == "drop":
            place[invocation] = None
            return
        advantages = np.broadcast_to(np.asarray(advantage, np.float32), len(tokens))
        place[invocation] = []
        for segment, (start, end) in enumerate(bounds):
            here = slice(start, min(end, start + self.o["capacity"]))
            place[invocation].append({
                "id": traj_id, "tokens": tokens[here], "mask": loss_mask[here], "logprobs": logprobs[here],
                "advantages": advantages[here], "per_token": self.o["token_advantages"], "version": policy_version,
                "length": here.stop - start, "segment": segment,
            })  # fmt: skip

    def seal(self, query: str, rollout: int, d: int, role: str) -> None:
        self.sealed[query, self.o["roles"].index(role), rollout] = d

    def fail(self, query: str, rollout: int, invocation: int, role: str) -> None:
        self.entries.setdefault((query, self.o["roles"].index(role), rollout), {})[invocation] = None

    def ready(self) -> list[str]:
        cells = [(r, k) for r in range(len(self.o["roles"])) for k in range(self.o["k"])]
        names = {query for query, _, _ in [*self.sealed, *self.entries]}

        def complete(q: str, r: int, k: int) -> bool:
            return len(self.entries.get((q, r, k), {})) == self.sealed.get((q, r, k), -1)

        return sorted((q for q in names if all(complete(q, r, k) for r, k in cells)), key=natural)

    def plan(self, step: int, queries: list[str], skip_zero: bool = False) -> TwinPlan:
        return TwinPlan(self, step, sorted(queries, key=natural), skip_zero)


class TwinPlan:
    def __init__(self, batcher: TwinBatcher, step: int, queries: list[str], skip_zero: bool) -> None:
        o = self.o = batcher.o
        self.queries = queries
        self.rows: list[Row] = []
        depth = max(o["d_max"])
        if o["mode"] == "none":
            chosen = [e for (q, _, _), e in batcher.entries.items() if q in queries]
            depth = max([1, *map(len, chosen)])
        groups = [(q, r) for q in queries for r in range(len(o["roles"]))]
        self.slots = np.full((len(groups), o["k"], depth), -1, np.int32)
        self.group_rollouts = [0] * len(groups)
        for g, (query, r) in enumerate(groups):
            for k in range(o["k"]):
                self._add_rollout(batcher.entries.get((query, r, k), {}), g, r, k, query, step)
        self.items = [
            i
            for i, row in enumerate(self.rows)
            if not (skip_zero and (row.trained == 0).all())
            for _ in range(row.multiplicity if o["mode"] == "duplicate" else 1)
        ]
        self.lengths = [self.rows[i].item["length"] for i in self.items]
        self.packing = pack(self.lengths, o["capacity"], o["dp"], o["cost"], o["max_segments"])
        self.max_segments = o["max_segments"] or max([1, *map(len, self.packing.bins)])
        self.padded = pad_rows(self.lengths, o["capacity"], o["dp"], o["max_segments"])

    def _add_rollout(self, entries: dict[int, Any], g: int, r: int, k: int, query: str, step: int) -> None:
        o = self.o
        present = [(i, entries[i]) for i in sorted(entries) if entries[i] is not None]
        d, d_max = len(present), o["d_max"][r]
        stream = Stream(o["seed"], step, query, k, o["roles"][r])
        copies = multiplicities(stream, d, d_max, o["mode"])
        self.group_rollouts[g] += d > 0
        used = 0
        for (i, item), m in zip(present, copies, strict=True):
            if m:
                self.slots[g, k, used : used + m] = len(self.rows)
                used += m
                trained = [part for part in item if part["mask"].any()]
                weight = weight_of(m, d, d_max, o["mode"], o["sequence_weight"]) / len(trained)
                self.rows += [Row(g, r, k, i, part["segment"], m, weight, part) for part in trained]

    def weight(self, item: int) -> np.float32:
        row = self.rows[self.items[item]]
        return np.float32(row.weight / (row.multiplicity if self.o["mode"] == "duplicate" else 1))

    def write(self, rank: int) -> dict[str, np.ndarray]:
        """What Batcher.write leaves in buffers of exactly the planned shape."""
        n, c, s = self.packing.n_mb, self.o["capacity"], self.max_segments
        out = {
            "ids": np.full((n, c), self.o["pad_id"], np.int32),
            "loss_mask": np.zeros((n, c), np.uint8),
            "logprobs": np.zeros((n, c), np.float32),
            "advantages": np.zeros((n, c), np.float32),
            "position_ids": np.zeros((n, c), np.int32),
            "cu_seqlens": np.full((n, s + 2), c, np.int32),
            "n_seg": np.zeros(n, np.int32),
            "max_seqlen": np.zeros(n, np.int32),
            "seg_advantage": np.zeros((n, s), np.float32),
            "seg_weight": np.zeros((n, s), np.float32),
            "seg_traj": np.full((n, s), -1, np.int64),
            "seg_row": np.full((n, s), -1, np.int32),
        }
        for mb, items in enumerate(self.packing.bins[rank * n : (rank + 1) * n]):
            at = 0
            out["cu_seqlens"][mb, 0] = 0
            for seg, item in enumerate(items):
                row = self.rows[self.items[item]]
                here = slice(at, at + row.item["length"])
                out["ids"][mb, here] = row.item["tokens"]
                out["loss_mask"][mb, here] = row.item["mask"]
                out["logprobs"][mb, here] = row.item["logprobs"]
                out["advantages"][mb, here] = row.item["advantages"]
                out["position_ids"][mb, here] = np.arange(row.item["length"])
                out["seg_advantage"][mb, seg] = row.advantage
                out["seg_weight"][mb, seg] = self.weight(item)
                out["seg_traj"][mb, seg] = row.item["id"]
                out["seg_row"][mb, seg] = self.items[item]
                at += row.item["length"]
                out["cu_seqlens"][mb, seg + 1] = at
            out["position_ids"][mb, at:] = np.arange(c - at)
            out["n_seg"][mb] = len(items)
            out["max_seqlen"][mb] = max([c - at, *(self.lengths[i] for i in items)])
        return out

    def write_padded(self, rank: int, micro_batch: int) -> dict[str, np.ndarray]:
        items = self.padded[micro_batch][rank]
        shape = (len(items), self.lengths[items[0]] if items else 0)
        out = {
            "ids": np.full(shape, self.o["pad_id"], np.int32),
            "loss_mask": np.zeros(shape, np.uint8),
            "logprobs": np.zeros(shape, np.float32),
        }
        columns = [("ids", "tokens"), ("loss_mask", "mask"), ("logprobs", "logprobs")]
        if self.o["token_advantages"]:
            out["advantages"] = np.zeros(shape, np.float32)
            columns.append(("advantages", "advantages"))
        rows = [self.rows[self.items[i]] for i in items]
        for r, row in enumerate(rows):
            for key, source in columns:
                out[key][r, : row.item["length"]] = row.item[source]
        out["lengths"] = np.array([row.item["length"] for row in rows], np.int32)
        out["seg_advantage"] = np.array([row.advantage for row in rows], np.float32)
        out["seg_weight"] = np.array([self.weight(i) for i in items], np.float32)
        out["seg_traj"] = np.array([row.item["id"] for row in rows], np.int64)
        out["seg_row"] = np.array([self.items[i] for i in items], np.int32)
        return out


def pad_rows(lengths: list[int], capacity: int, dp: int, max_rows: int) -> list[list[list[int]]]:
    """[step][rank] -> items, by decreasing length."""
    cuts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rows = len(cuts[-1]) + 1 if cuts else 0
        if cuts and rows * lengths[cuts[-1][0]] <= capacity and not (max_rows and rows > max_rows):
            cuts[-1].append(i)
        else:
            cuts.append([i])
    while len(cuts) % dp:
        areas = [len(c) * lengths[c[0]] if len(c) > 1 else 0 for c in cuts]
        if max(areas) == 0:
            cuts.append([])
        else:
            w = areas.index(max(areas))
            half = (len(cuts[w]) + 1) // 2
            cuts[w : w + 1] = [cuts[w][:half], cuts[w][half:]]
    return [cuts[i : i + dp] for i in range(0, len(cuts), dp)]
