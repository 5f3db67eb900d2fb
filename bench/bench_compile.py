"""Registers, shared memory and spills of every Triton kernel on sm_80, sm_90 and sm_100, compiled without a GPU.

    python -m bench.bench_compile [--json FILE] [--arch 80 90 100]

Every variant is compiled with the hints real calls have: pointers, row strides and vocabularies divisible by
16 (and one with an odd vocabulary).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mgrpo.kernels import group_advantage, grpo_loss, logprob
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


def variants() -> list[Variant]:
    """Every kernel at the shipped block sizes, in the specialisations training uses and the widest ones."""
    out: list[Variant] = []
    loss = {"VEC": device.VEC, "BLOCK_N": device.GROUP_BLOCK, "NEED_GRAD": True, "ESTIMATOR": 0}
    plain = {"LOSS": 0, "KL": 0, "ENTROPY": False, "CORRECTION": 0, "GROUPS": False, "WEIGHTED": False}
    full = {"KL": 3, "ENTROPY": True, "CORRECTION": 2, "GROUPS": True, "WEIGHTED": True}
    for dtype in ("bf16", "fp32"):
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
        rows = {"VEC": device.VEC, "HAS_ACTIVE": True}
        out.append(_row_variant(f"partials {dtype}", logprob.partials_kernel, dtype, rows))
        block = {"BLOCK": device.SCALE_BLOCK}
        out.append(_variant(f"scale {dtype}", logprob.scale_kernel, dtype, block, warps=8))
    group = {"ESTIMATOR": 0, "WEIGHTED": True, "BLOCK": device.GROUP_BLOCK}
    kernel = group_advantage.group_advantage_kernel
    out.append(_variant("group_advantage", kernel, "fp32", group, warps=2))
    wide = {"WEIGHTED": True, "BLOCK": 1024}
    out.append(_variant("batch_deviation", group_advantage.batch_deviation_kernel, "fp32", wide, warps=4))
    return out


_INT64 = {"target_ids", "seq_id", "begin", "end", "order"}
_INT32 = {"group_id"}
_BYTES = {"active", "has_grad_out"}
_FLOAT64 = {"deviation"}
_SIZES = {"stride", "grad_stride", "vocabulary", "n"}
_SCALARS = {
    "k", "inverse_temperature", "eps_low", "eps_high", "delta", "log_ratio_clip", "tau_pos", "tau_neg",
    "kl_coef", "entropy_coef", "correction_low", "correction_high", "advantage_eps", "eps",
}  # fmt: skip


def _row_variant(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], aligned: bool = True
) -> Variant:
    """A kernel of whole rows, launched as the ops launch it."""
    launch = device.row_launch(aligned)
    variant = _variant(name, kernel, dtype, constants | {"BLOCK": launch.block}, launch.warps)
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
            types[argument] = f"*{dtype}"
        elif argument == "out" and name == "batch_deviation":
            types[argument] = "*fp64"
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
    registers, spills = _assemble(compiled.asm["ptx"])
    return Report(variant.name, arch, registers, compiled.metadata.shared, spills)


def _assemble(ptx: str) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads) from ptxas -v for the PTX's own target."""
    found = re.search(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    if found is None:
        raise RuntimeError("the PTX names no target")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if int(found[2]) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={found[1]}", path, "-o", Path(scratch) / "kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    registers = max(int(x) for x in re.findall(r"Used (\d+) registers", log))
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    if not spills:
        raise RuntimeError(f"ptxas reported no spill figures: {log}")
    return registers, sum(spills)


def main() -> None:
    """Print the table; exit 1 if anything spills."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the reports here")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS))
    args = parser.parse_args()
    reports = [build(v, arch) for v in variants() for arch in args.arch]
    print(f"{'kernel':34}{'target':>8}{'registers':>11}{'shared B':>10}{'spills B':>10}")
    for r in reports:
        print(f"{r.variant:34}{'sm_' + str(r.arch):>8}{r.registers:11}{r.shared_bytes:10}{r.spill_bytes:10}")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    raise SystemExit(any(r.spill_bytes for r in reports))


if __name__ == "__main__":
    main()
