"""Registers, shared memory and spills of every Triton kernel on sm_80, sm_90 and sm_100, compiled without a GPU; then
the instructions of the loss kernel's sweeps a logit, and the times these and the bytes predict on GPUs (sass.py).

    python -m bench.bench_compile [--json FILE] [--arch 80 90 100] [--only TEXT]

Every variant is compiled with the hints real calls have: pointers, row strides and vocabularies divisible by
16 (and one with an odd vocabulary).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import sass
from mgrpo.kernels import group_advantage, grpo_loss, logprob, token_loss, tree_merge
from mgrpo.ops import device

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: types of its run-time arguments, values of its constants."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    registers: int | None = None  # bound of a thread
    aligned: bool = True  # sizes and row strides divisible by 16, as every padded vocabulary has them


@dataclass(frozen=True)
class Report:
    """What ptxas says of one variant on one target."""

    variant: str
    arch: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    sweeps: dict[str, sass.Sweep] = field(default_factory=dict)  # of a loss kernel on aligned rows


PREDICTED = (16384, 151936)
"""Rows and vocabulary of the predicted times."""


def variants() -> list[Variant]:
    """Every kernel at the shipped block sizes, in the specialisations training uses and the widest ones."""
    out: list[Variant] = []
    loss = {"BLOCK_N": device.GROUP_BLOCK, "NEED_GRAD": True, "ESTIMATOR": 0}
    plain = {"LOSS": 0, "KL": 0, "ENTROPY": False, "CORRECTION": 0, "GROUPS": False, "WEIGHTED": False}
    full = {"KL": 3, "ENTROPY": True, "CORRECTION": 2, "GROUPS": True, "WEIGHTED": True}
    for dtype in ("bf16", "fp32", "fp32 to bf16"):
        cases = {
            "plain": plain | {"HAS_OLD": True},
            "groups": plain | {"GROUPS": True, "WEIGHTED": True, "HAS_OLD": True},
            "groups without weights": plain | {"GROUPS": True, "HAS_OLD": False},
            "groups, forward only": plain | {"GROUPS": True, "HAS_OLD": True, "NEED_GRAD": False},
            "everything": full | {"LOSS": 0, "HAS_OLD": True},
            "everything, batch": full | {"LOSS": 0, "HAS_OLD": True, "ESTIMATOR": 3},
            "sapo": full | {"LOSS": 2, "HAS_OLD": False},
            "cispo": full | {"LOSS": 1, "HAS_OLD": True},
        }
        # what ptxas, left alone, spills for
        thin = {"LOSS": 2, "KL": 2, "GROUPS": True, "HAS_OLD": False, "NEED_GRAD": False, "ESTIMATOR": 3}
        kernel = grpo_loss.grpo_loss_kernel
        for case, constants in cases.items():
            out.append(_row_variant(f"grpo_loss {dtype} {case}", kernel, dtype, loss | constants))
        for case, constants in (
            ("odd vocabulary", full | {"LOSS": 0, "HAS_OLD": True}),
            ("sapo, batch, forward", plain | thin),
        ):
            out.append(
                _row_variant(f"grpo_loss {dtype} {case}", kernel, dtype, loss | constants, aligned=False)
            )
        out.append(_row_variant(f"gradient {dtype}", logprob.gradient_kernel, dtype, {}))
        rows = {"HAS_ACTIVE": True}
        out.append(_row_variant(f"partials {dtype}", logprob.partials_kernel, dtype, rows))
        block = {"BLOCK": device.SCALE_BLOCK}
        out.append(_variant(f"scale {dtype}", logprob.scale_kernel, dtype, block, warps=8))
    total = {"BLOCK": device.TOTAL_BLOCK, "HAS_OLD": True, "HAS_ROLLOUT": True, "KL": 3, "CORRECTION": 0}
    terms = {"KL_ACTS": True, "ENTROPY": True, "HAS_REF": True}
    for case, constants in {
        "no other term": dict.fromkeys(terms, False) | {"LOSS": 0},
        "everything": terms | {"LOSS": 0, "HAS_OLD": False, "CORRECTION": 2},
        "sapo": terms | {"LOSS": 2, "KL": 2},
        "cispo": terms | {"LOSS": 1, "KL": 1},
    }.items():
        kernel, constants = token_loss.token_loss_kernel, total | constants
        out.append(_variant(f"token_loss {case}", kernel, "fp32", constants, warps=device.TOTAL_WARPS))
    group = {
        "ESTIMATOR": 0,
        "WEIGHTED": True,
        "UNBIASED": False,
        "ROWS": device.GROUP_ROWS,
        "BLOCK": device.GROUP_BLOCK,
    }
    kernel = group_advantage.group_advantage_kernel
    out.append(_variant("group_advantage", kernel, "fp32", group, warps=1))
    wide = {"WEIGHTED": True, "UNBIASED": False, "BLOCK": 1024}
    out.append(_variant("batch_deviation", group_advantage.batch_deviation_kernel, "fp32", wide, warps=4))
    for listed in (False, True):
        merge = {"HEADS": 16, "DIM": 128, "WIDTH": 128, "LISTED": listed, "BLOCK": tree_merge.BLOCK}
        name = f"tree_merge{', listed' if listed else ''}"
        out.append(_variant(name, tree_merge.tree_merge_kernel, "bf16", merge, warps=4))
    return out


_INT64 = {"target_ids", "seq_id", "order", "at"}
_INT32 = {"group_id", "ids"}
_BYTES = {"active", "has_grad_out", "mask"}
_FLOAT64 = {"deviation"}
_SIZES = {"stride", "grad_stride", "vocabulary", "n", "first", "tokens"}
_SCALARS = {
    "k", "inverse_temperature", "eps_low", "eps_high", "delta", "log_ratio_clip", "tau_pos", "tau_neg",
    "kl_coef", "entropy_coef", "correction_low", "correction_high", "advantage_eps", "eps", "lower", "upper",
}  # fmt: skip


def _row_variant(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], aligned: bool = True
) -> Variant:
    """A kernel of whole rows, launched as the ops launch it."""
    launch = device.row_launch(aligned, 2 if dtype == "bf16" else 4)
    sizes = {"BLOCK": launch.block, "VEC": launch.vec, "TILES": launch.tiles}
    constants = constants | {k: v for k, v in sizes.items() if k in kernel.arg_names}
    variant = _variant(name, kernel, dtype, constants, launch.warps)
    return replace(variant, registers=launch.registers, aligned=aligned)


def _variant(name: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int) -> Variant:
    types: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in _SIZES:
            types[argument] = "i32"
        elif argument in _SCALARS:
            types[argument] = "fp32"
        elif argument in ("logits", "grad", "x"):
            read, _, written = dtype.partition(" to ")
            types[argument] = f"*{written or read}" if argument == "grad" else f"*{read}"
        elif argument == "out" and name == "batch_deviation":
            types[argument] = "*fp64"
        elif argument in ("out", "more") and name.startswith("tree_merge"):
            types[argument] = f"*{dtype}"
        else:
            pointers = {"*i64": _INT64, "*i32": _INT32, "*u8": _BYTES, "*fp64": _FLOAT64}
            types[argument] = next((t for t, names in pointers.items() if argument in names), "*fp32")
    return Variant(name, kernel, types, constants, warps)


def build(variant: Variant, arch: int, max_registers: int | None = None) -> Report:
    """Compile to PTX and let ptxas say what it costs, within the variant's bound or max_registers a thread."""
    names = variant.kernel.arg_names
    hints = {
        (names.index(a),): [["tt.divisibility", 16]]
        for a, t in variant.types.items()
        if t.startswith("*") or (variant.aligned and a in ("stride", "grad_stride", "vocabulary"))
    }
    constants = {(names.index(a),): v for a, v in variant.constants.items()}
    source = ASTSource(fn=variant.kernel, signature=variant.types, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": variant.warps, "maxnreg": max_registers or variant.registers}
    compiled = triton.compile(source, target=target, options=options)
    registers, spills, code = _assemble(compiled.asm["ptx"])
    counted = {}
    if variant.name.startswith("grpo_loss") and variant.aligned:
        counted = sass.sweeps(code, _read_bytes(variant))
    return Report(variant.name, arch, registers, compiled.metadata.shared, spills, counted)


def _read_bytes(variant: Variant) -> int:
    """Of a logit."""
    return 2 if variant.types["logits"] == "*bf16" else 4


def _assemble(ptx: str) -> tuple[int, int, str]:
    """(registers, bytes of spill stores and loads, machine code) from ptxas -v for the PTX's own target."""
    found = re.search(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    if found is None:
        raise RuntimeError("the PTX names no target")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if int(found[2]) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.ptx"
        path.write_text(ptx)
        cubin = Path(scratch) / "kernel.cubin"
        command = [tool, "-v", f"--gpu-name={found[1]}", path, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
        code = sass.disassemble(cubin)
    registers = max(int(x) for x in re.findall(r"Used (\d+) registers", log))
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    if not spills:
        raise RuntimeError(f"ptxas reported no spill figures: {log}")
    return registers, sum(spills), code


def print_counts(reports: list[Report]) -> None:
    """Instructions a logit of each sweep, by pipe."""
    header = f"{'instructions a logit':34}{'target':>8}{'sweep':>12}{'all':>8}"
    print("\n" + header + "".join(f"{pipe:>9}" for pipe in sass.PIPES))
    for r in reports:
        for name, sweep in r.sweeps.items():
            counts = "".join(f"{sweep.counts[pipe]:9.2f}" for pipe in sass.PIPES)
            print(f"{r.variant:34}{'sm_' + str(r.arch):>8}{name:>12}{sweep.total:8.2f}{counts}")


def predictions(reports: list[Report]) -> list[dict[str, Any]]:
    """Times of the plain loss, forward and gradient, on every GPU, from what its machine code holds."""
    out = []
    written = {"bf16": 2, "fp32": 4, "fp32 to bf16": 2}
    for r in reports:
        dtype = r.variant.removeprefix("grpo_loss ").removesuffix(" plain")
        if dtype not in written or len(r.sweeps) < 2:
            continue
        moved = 2 * (2 if dtype == "bf16" else 4) + written[dtype]
        for gpu in sass.GPUS:
            if gpu.arch == r.arch:
                found = sass.predict(gpu, r.sweeps, *PREDICTED, moved)
                out.append({"variant": r.variant, **asdict(found), "total": found.total})
    return out


def main() -> None:
    """Print the table; exit 1 if anything spills."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the reports here")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--only", default="", help="variants whose name holds this")
    args = parser.parse_args()
    reports = [build(v, arch) for v in variants() if args.only in v.name for arch in args.arch]
    print(f"{'kernel':40}{'target':>8}{'registers':>11}{'shared B':>10}{'spills B':>10}")
    for r in reports:
        print(f"{r.variant:40}{'sm_' + str(r.arch):>8}{r.registers:11}{r.shared_bytes:10}{r.spill_bytes:10}")
    print_counts(reports)
    rows, vocabulary = PREDICTED
    print(f"\npredicted, not measured: T={rows}, V={vocabulary}, statistics and gradient, milliseconds")
    print(f"{'kernel':34}{'GPU':>12}{'memory':>9}{'instructions':>14}{'busiest':>9}{'predicted':>11}")
    found = predictions(reports)
    for p in found:
        times = f"{p['memory']:9.2f}{p['instructions']:14.2f}{p['busiest']:>9}{p['total']:11.2f}"
        print(f"{p['variant']:34}{p['gpu']:>12}{times}")
    if args.json:
        lines = [json.dumps(asdict(r)) for r in reports]
        text = ",\n".join(lines), ",\n".join(json.dumps(p) for p in found)
        args.json.write_text('{{"kernels": [\n{}\n],\n"predicted": [\n{}\n]}}\n'.format(*text))
    raise SystemExit(any(r.spill_bytes for r in reports))


if __name__ == "__main__":
    main()
