"""What a logit costs in the machine code of a kernel of whole rows, and the time that predicts.

A row kernel has two sweeps: the statistics read the row, the gradient reads it again and writes. In the disassembly
each is the loop that loads 16 bytes a thread without a mask and exponentiates; a loop that also stores is the
gradient's. Instructions are counted in the loop that takes the most logits a turn, by the pipe they are issued to.

The prediction is the larger of two times, as if nothing else cost any: the bytes of all passes at SUSTAINED of the
memory's speed (no second read is served by the L2 cache), and the instructions at the rate of the busiest of the pipes
and of the four schedulers (32 lanes a clock each) of a multiprocessor. It is a bound, not a measurement.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

SUSTAINED = 0.92
"""Of the memory's nominal speed that a copy reaches."""
ISSUE = 128  # instructions of single threads that a multiprocessor issues in a clock
PIPES = ("fma", "alu", "exp", "memory", "uniform", "control")
_RATES = {"alu": 64, "exp": 16}  # of single threads in a clock; fma is the GPU's
_LABEL = re.compile(r"^(\.L\w+):")
_CODE = re.compile(r"/\*[0-9a-f]+\*/\s+(@!?U?P\d+\s+)?([A-Z][\w.]*)(.*?);")


@dataclass(frozen=True)
class Gpu:
    """Figures of the maker's data sheets; the clock is what the card holds under load."""

    name: str
    arch: int
    processors: int
    gigahertz: float
    gigabytes_per_second: float
    fma: int  # of single threads in a clock of a multiprocessor


GPUS = (
    Gpu("A100 80GB", 80, 108, 1.41, 2039, 64),
    Gpu("H100 SXM", 90, 132, 1.755, 3350, 128),
    Gpu("H200", 90, 132, 1.755, 4800, 128),
    Gpu("B200", 100, 148, 1.85, 7700, 128),
)


@dataclass(frozen=True)
class Sweep:
    """Instructions a logit, by pipe."""

    logits: int  # of a thread in one turn of the loop
    counts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.counts.values())


@dataclass(frozen=True)
class Prediction:
    """Milliseconds on one GPU."""

    gpu: str
    memory: float
    instructions: float
    busiest: str

    @property
    def total(self) -> float:
        return max(self.memory, self.instructions)


def disassemble(cubin: Path) -> str:
    """The machine code as text."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True, timeout=120).stdout


def sweeps(text: str, element_size: int) -> dict[str, Sweep]:
    """{"statistics": ..., "gradient": ...} of a row kernel whose logits have element_size bytes; what it has not is
    absent."""
    found: dict[str, Sweep] = {}
    for body in _loops(text):
        loads = [op for guard, op in body if op.startswith("LDG") and op.endswith(".128") and not guard]
        logits = len(loads) * 16 // element_size
        exponentials = sum(op.startswith("MUFU.EX2") for _, op in body)
        if not logits or exponentials < logits:
            continue
        name = "gradient" if any(op.startswith("STG") for _, op in body) else "statistics"
        counts = Counter(pipe(op) for _, op in body)
        if name not in found or logits > found[name].logits:
            found[name] = Sweep(logits, {p: counts[p] / logits for p in PIPES})
    return found


def _loops(text: str) -> list[list[tuple[str, str]]]:
    """The innermost loops: from a label to the first branch back to it, as (predicate, operation)."""
    loops: list[list[tuple[str, str]]] = []
    label, body = "", []
    for line in text.splitlines():
        if here := _LABEL.match(line.strip()):
            label, body = here[1], []
        elif code := _CODE.search(line):
            body.append(((code[1] or "").strip(), code[2]))
            if code[2].startswith("BRA") and f"({label})" in code[3].replace("`", ""):
                loops.append(body)
                label, body = "", []
    return loops


def pipe(operation: str) -> str:
    """Which of PIPES executes an operation of the machine code."""
    name = operation.split(".")[0]
    if name in ("MUFU", "FRND", "F2I", "I2F", "F2F"):
        return "exp"
    if name.startswith(("FADD", "FMUL", "FFMA", "IMAD", "HFMA", "HADD", "HMUL")):
        return "fma"
    if name.startswith(("LD", "ST", "ATOM", "RED")):
        return "memory"
    if name.startswith("U") or name in ("R2UR", "S2UR", "CS2R"):
        return "uniform"
    if name in ("BRA", "EXIT", "BAR", "NOP", "BSSY", "BSYNC", "WARPSYNC", "RET", "CALL", "DEPBAR"):
        return "control"
    return "alu"


def predict(gpu: Gpu, parts: dict[str, Sweep], rows: int, vocabulary: int, bytes_moved: float) -> Prediction:
    """The time of all sweeps over (rows, vocabulary) logits; bytes_moved: of all passes, a logit."""
    logits = rows * vocabulary
    memory = logits * bytes_moved / (SUSTAINED * gpu.gigabytes_per_second * 1e9)
    rates = {"issue": ISSUE, "fma": gpu.fma, **_RATES}
    clocks = dict.fromkeys(rates, 0.0)
    for sweep in parts.values():
        for name, rate in rates.items():
            clocks[name] += (sweep.total if name == "issue" else sweep.counts[name]) / rate
    busiest = max(clocks, key=lambda name: clocks[name])
    seconds = logits * clocks[busiest] / (gpu.processors * gpu.gigahertz * 1e9)
    return Prediction(gpu.name, memory * 1e3, seconds * 1e3, busiest)
