"""Weights on their way from a trainer to an engine: bytes, seconds and memory of each way.

    python -m bench.bench_weights [--quick] [--json PATH] [--models smollm2 random-1.2b] [--rounds N]

A trainer process holds float32 weights and makes Adam steps of random gradients; a receiver process holds the weights
in bfloat16, as an engine does. After each step every way brings the new version over, in turn, wall time (both
processes work on it): seconds are medians. encode: until it can be asked for; transfer: tcp loopback; apply: until it
is in the engine's memory.

    patch        what changed, over the link (what a run does)
    whole        a whole bfloat16 version over the link (a run's first version)
    folder       the same, then through a file that is read again (sync "fs")
    gloo         torch.distributed's broadcast, tensor after tensor: a floor
    one object   all of it in float32 as one safetensors object down a plain TCP stream

Memory is the peak of resident memory (VmHWM, set back through /proc/self/clear_refs): of the trainer beyond its float32
weights and the base that it keeps, of the receiver beyond its model.
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.common import Comparison, Report, parser
from bench.weights_parts import REAL, available, shapes_of

RATES = (1e-6, 1e-5, 1e-4)
GB = 1e9
BEYOND = 0.6  # GB of memory that a version may take on each side
Samples = dict[str, list[dict[str, Any]]]


class Process:
    """One of the two; see weights_parts.py."""

    def __init__(self, name: str, model: str, folder: str) -> None:
        command = [sys.executable, "-m", "bench.weights_parts", name, model, folder]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = name
        self.memory = self.answer()

    def ask(self, command: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self._name} has ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.ask(command, **arguments)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Pair:
    """A trainer and a receiver of one model."""

    def __init__(self, model: str, folder: str) -> None:
        self.model, self.version = model, -1
        self.trainer, self.receiver = Process("trainer", model, folder), Process("receiver", model, folder)
        found = self.trainer.do("url")
        self.size = int(found["size"])  # bytes of the model in bfloat16
        self.port = int(self.receiver.do("connect", url=found["url"])["port"])
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank, process in enumerate((self.trainer, self.receiver)):
            process.ask("join", port=port, rank=rank)
        self.before = [process.answer()["now"] for process in (self.trainer, self.receiver)]

    def publish(self) -> dict[str, Any]:
        self.version += 1
        return self.trainer.do("publish", version=self.version)

    def step(self, lr: float) -> None:
        self.trainer.do("step", lr=lr)

    def fetched(self, patch: bool) -> dict[str, Any]:
        """Over the link: what was published."""
        return self.receiver.do("fetch", version=self.version, patch=patch)

    def both(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A way that both take part in at once."""
        self.receiver.ask(command)
        self.trainer.ask(command, **arguments)
        sent, got = self.trainer.answer(), self.receiver.answer()
        seconds = sent.get("seconds", {}) | got["seconds"]
        if "encode" in seconds:  # the receiver waits for it
            seconds["transfer"] = max(0.0, seconds["transfer"])
        return {"seconds": seconds, "bytes": sent["bytes"], "peaks": (sent["peak"], got["peak"])}

    def differs(self) -> bool:
        """Does the receiver hold other bits than the trainer?"""
        return bool(self.trainer.do("digest")["digest"] != self.receiver.do("digest")["digest"])

    def beyond(self, process: int, top: int) -> float:
        """GB of peak memory beyond the model, and beyond the trainer's base."""
        return (top - self.before[process] - (self.size if process == 0 else 0)) / GB

    def close(self) -> None:
        self.trainer.close()
        self.receiver.close()


@contextmanager
def pair(model: str) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as folder:
        made = Pair(model, folder)
        try:
            yield made
        finally:
            made.close()


def memory_rows(report: Report, p: Pair, rounds: int) -> None:
    """Nothing but what a run does: the first version whole, then patches."""
    p.publish()
    got = p.fetched(patch=False)
    tops = {"the first version, whole": [(p.trainer.do("peak")["peak"], got["top"])], "patches": []}
    assert got["whole"] and not p.differs()
    for _ in range(rounds):
        p.step(RATES[0])
        p.publish()
        got = p.fetched(patch=True)
        tops["patches"].append((p.trainer.do("peak")["peak"], got["top"]))
        assert not got["whole"]
    for what, found in tops.items():
        for side, name in enumerate(("trainer", "receiver")):
            value = max(p.beyond(side, top[side]) for top in found)
            note = f"beyond a base of {p.size / GB:.2f} GB" if side == 0 else "beyond its model"
            report.figure(f"{p.model}: {name}'s memory, {what}", value, "GB", at_most=BEYOND, note=note)


def take(samples: Samples, name: str, found: dict[str, Any]) -> None:
    samples.setdefault(name, []).append(found)


def round_of_ways(p: Pair, samples: Samples, lr: float, rivals: bool) -> int:
    """A step, and every way for its version, in turn; how often the receiver did not hold the trainer's bits."""
    p.step(lr)
    sent, got = p.publish(), p.fetched(patch=True)
    patch = {
        "seconds": sent["seconds"] | got["seconds"],
        "bytes": got["bytes"],
        "peaks": (sent["peak"], got["peak"]),
    }
    take(samples, "patch", patch)
    wrong = int(p.differs())
    if rivals:
        cast = p.trainer.do("cast")
        for name, got in (
            ("whole", p.fetched(patch=False)),
            ("folder", p.receiver.do("through_folder", version=p.version)),
        ):
            seconds, peaks = cast["seconds"] | got["seconds"], (cast["peak"], got["peak"])
            take(samples, name, {**got, "seconds": seconds, "peaks": peaks})
        take(samples, "gloo", p.both("broadcast"))
        wrong += int(p.differs())
        if has_room(p):
            take(samples, "one object", p.both("one_object", port=p.port))
    return wrong


def has_room(p: Pair) -> bool:
    """One float32 object is there twice on each side for a while."""
    return available() > 4 * 2 * p.size + 2 * GB


def way_rows(report: Report, p: Pair, lr: float, samples: Samples, wrong: int) -> None:
    """Figures of one learning rate."""
    at = f"{p.model}, lr {lr:g}"
    middle = {
        name: statistics.median(sum(s["seconds"].values()) for s in found) for name, found in samples.items()
    }
    for name, found in samples.items():
        largest = max(s["bytes"] for s in found)
        bound = 101.0 if name == "patch" else None
        if name == "patch" and lr == RATES[0] and p.model not in REAL:
            bound = 4.0
        note = f"{largest / 1e6:.1f} MB; share of {p.size / 1e6:.0f} MB in bfloat16"
        report.figure(f"{at}: {name}, bytes", 100 * largest / p.size, "%", at_most=bound, note=note)
        parts = {part: statistics.median(s["seconds"][part] for s in found) for part in found[0]["seconds"]}
        text = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
        peaks = [max(s["peaks"][side] for s in found) / GB for side in (0, 1)]
        note = f"{text}; memory +{peaks[0]:.2f} / +{peaks[1]:.2f} GB"
        report.figure(f"{at}: {name}", middle[name], "s", note=note)
    for name in samples:
        if name != "patch":
            against = Comparison(middle["patch"], {name: middle[name]}, unit="s")
            report.compare(f"{at}: {name} / patch, seconds", against)
    report.figure(f"{at}: versions with other bits", wrong, at_most=0)


def model_rows(report: Report, model: str, rounds: int) -> None:
    needed = 8 * sum(math.prod(shape) for _, shape in shapes_of(model)) + 2 * GB
    if available() < needed:
        print(f"{model}: needs {needed / GB:.0f} GB of memory, {available() / GB:.0f} are free")
        return
    with pair(model) as p:
        memory_rows(report, p, rounds)
        for lr in RATES:
            samples: Samples = {}
            first = lr == RATES[0]
            wrong = sum(round_of_ways(p, samples, lr, rivals=first) for _ in range(rounds))
            if first and "one object" not in samples:
                print(f"{model}: no float32 object: it needs {8 * p.size / GB:.0f} GB of memory for a while")
            way_rows(report, p, lr, samples, wrong)


def main() -> int:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", help="smollm2, random-120m, random-1.2b")
    p.add_argument("--rounds", type=int, help="versions a learning rate")
    args = p.parse_args()
    report = Report("bench_weights")
    for model in args.models or (["random-120m"] if args.quick else ["smollm2", "random-1.2b"]):
        if model in REAL and not REAL[model].exists():
            print(f"{model}: {REAL[model]} is missing (make smollm2-model)")
            continue
        model_rows(report, model, args.rounds or (2 if args.quick else 3))
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
