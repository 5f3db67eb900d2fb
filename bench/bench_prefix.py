"""A whole optimizer step on rows with shared prefixes, each prefix computed once, against each row computed whole.

    python -m bench.bench_prefix [--shape rollouts|answers|system|fork|long|nothing|cut ...] [--model NAME|FOLDER]
        [--device cpu|cuda] [--dtype float32|bfloat16] [--scale S] [--capacity N] [--checkpointing] [--rounds N]
        [--quick] [--json PATH]

Random weights; the shapes of prefix_workload.py, their lengths times `--scale`. Both ways are the project's learner on
the same model: `policy.share_prefixes` on, with micro-batches of as many distinct tokens as `--capacity`, and off, with
padded rows of as many tokens. For each shape

    tokens          that enter the model, each row whole / each prefix once
    arithmetic      FLOPs of the step, the same ratio: head and attention count too (mgrpo/profiling/flops.py)
    measured        the ratio of their times
    off arithmetic  (time shared / whole) / (FLOPs shared / whole): 1 where each FLOP that is saved saves its time

`rollouts` has the rivals of prefix_rivals.py. `cut` is that shape with a capacity below its tree: the prefix repeated
in each micro-batch against the prefix held, in two passes. `nothing` shares no prefix: what looking for them costs.
Every way must have the gradient of rows computed whole (1e-5 of its size in float32) before any time counts.

CPU: 4 layers of SmolLM2's width by default, float32, one thread, process time; lengths are short, so the scale of a
shape is a part of its figures. GPU: Qwen3-0.6B's shape at full scale, bfloat16 over float32 weights, wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench import prefix_workload as work
from bench.bench_train_step import OURS, Checked, check, with_sdpa
from bench.common import Comparison, Report, interleave, parser
from bench.prefix_rivals import grouper_step, masked_step
from bench.step_rivals import Step, Trainee, generation, naive_step, trl_step
from bench.step_workload import LOSS, cut, make_model, make_policy, model_name, sample, settings_of
from mgrpo.model import attention
from mgrpo.model.policy import Policy
from mgrpo.profiling.flops import ModelFlops, flops_of
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, adamw

WHOLE, REPEATED = "ours, each row whole", "ours, prefix repeated"
CUT, NOTHING = "cut", "nothing"
CASES = (*work.SHAPES, CUT)
CPU_SCALE = {"rollouts": 1 / 8, "answers": 1 / 16, "system": 1 / 64, "fork": 1 / 8, "long": 1 / 64}
CPU_SCALE |= {NOTHING: 1 / 16, CUT: 1 / 8}
QUICK_CASES, QUICK_SCALE = ("rollouts", CUT), 1 / 2
"""Of the CPU's scale."""
CUT_ROWS = 2
"""Of a micro-batch of `cut`."""
CAPACITY = 16384
"""Distinct tokens of a micro-batch on a GPU; on a CPU it holds a whole tree."""
OFF_ARITHMETIC, OFF_NOTHING, GRADIENT = 1.15, 1.02, 1e-5
HALF_GRADIENT = 0.1
"""In bfloat16, for ours alone: two layouts of the same whole rows were 0.056 apart (bench_train_step, 28 layers, one
H100). The rivals round their logits, which ours does not, so they have no bound there."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape's step in its forms."""

    name: str
    rows: MicroBatch
    shared: MiniBatch
    whole: MiniBatch
    repeated: MiniBatch | None = None
    """Of `cut`: the micro-batches of `shared` without a held prefix."""


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shape", nargs="+", choices=CASES, help="these alone")
    arguments.add_argument("--model", type=model_name, help="quick (4 layers); on a GPU qwen3-0.6b")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32; on a GPU bfloat16")
    arguments.add_argument("--scale", type=float, help="of lengths; 1 on a GPU, each shape's own on a CPU")
    arguments.add_argument("--capacity", type=int, help="distinct tokens of a micro-batch")
    arguments.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--no-rivals", action="store_true", help="ours alone")
    args = arguments.parse_args(given)
    for name in ("scale", "capacity", "rounds"):
        if (value := getattr(args, name)) is not None and not value > 0:
            arguments.error(f"--{name} {value} is not above 0")
    gpu = args.device == "cuda"
    args.model = args.model or ("qwen3-0.6b" if gpu else "quick")
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    args.shape = args.shape or (list(QUICK_CASES) if args.quick else list(CASES))
    args.no_rivals |= args.quick
    args.lora, args.compile, args.limit = 0, False, math.inf  # of bench_train_step's functions
    return args


def case_of(args: argparse.Namespace, policy: Policy, name: str) -> Case:
    """The rows of a shape, with the policy's own log-probs, in the micro-batches of both layouts."""
    shape = work.SHAPES["rollouts" if name == CUT else name]
    scale = args.scale or (1.0 if args.device == "cuda" else CPU_SCALE[name])
    rows = work.make_rows(shape.scaled(scale * (QUICK_SCALE if args.quick else 1.0)), policy.vocab_size)
    longest, tokens = int(rows.lengths.max()), work.tree_of(rows).tokens
    capacity = args.capacity or (CAPACITY if args.device == "cuda" else tokens)
    if name == CUT:
        answers = longest - len(work.common_prefix(rows))
        capacity = longest + (CUT_ROWS - 1) * answers
    for number in range(len(rows.lengths)):
        part = rows.rows(torch.arange(len(rows.lengths)) == number)
        sample(policy, [part])
        rows.rollout_logprobs[number] = part.rollout_logprobs[0]
    denominator, capacity = float(rows.loss_mask.sum()), max(capacity, longest)
    parts, repeated = work.pieces(rows, capacity), None
    if len(parts) > 1 and len(prefix := work.common_prefix(rows)):
        repeated = MiniBatch(parts, denominator)
        parts = work.held(parts, prefix)
    whole = MiniBatch(cut(rows, capacity // (longest - 1) * longest), denominator)  # entering tokens, too
    return Case(name, rows, MiniBatch(parts, denominator), whole, repeated)


@contextlib.contextmanager
def sharing(policy: Policy, on: bool) -> Any:
    """The same policy with prefixes computed once, or with every row whole."""
    before = policy.shares
    policy.shares = on
    try:
        yield
    finally:
        policy.shares = before


def our_step(
    trainee: Trainee, policy: Policy, batch: MiniBatch, share: bool, wait: Callable[[], None]
) -> Step:
    """The project's learner."""
    learner = Learner(policy, trainee.optimizer, LOSS, 1.0)

    def step() -> None:
        trainee.model.set_attn_implementation("sdpa")
        (attention.use_trees if share else attention.use)(trainee.model, policy.attention)
        learner.grad_clip = trainee.grad_clip
        with sharing(policy, share):
            learner.step(batch)
        wait()

    return step


def providers_of(args: argparse.Namespace, trainee: Trainee, policy: Policy, case: Case) -> dict[str, Step]:
    """Rows computed whole first, whose gradient is the others' measure; rivals for `rollouts` alone."""
    cpu = args.device == "cpu"
    wait = (lambda: None) if cpu else torch.cuda.synchronize
    found = {WHOLE: our_step(trainee, policy, case.whole, False, wait)}
    found[OURS] = our_step(trainee, policy, case.shared, True, wait)
    if case.repeated is not None:
        found[REPEATED] = our_step(trainee, policy, case.repeated, True, wait)
    if case.name == "rollouts" and not args.no_rivals:
        found |= rivals_of(args, trainee, policy, case, wait)
    return found


def rivals_of(
    args: argparse.Namespace, trainee: Trainee, policy: Policy, case: Case, wait: Callable[[], None]
) -> dict[str, Step]:
    """Those that can run here; the others are named."""
    cpu = args.device == "cpu"

    def half() -> Any:
        both = contextlib.ExitStack()
        both.enter_context(policy.full_precision())
        both.enter_context(torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"))
        return both

    # Rows of a micro-batch: as many as ours without shared prefixes; on a GPU what whole logits leave room for.
    size = len(case.whole.micro[0].lengths) if cpu else 2
    once = case.repeated or case.shared  # no rival holds a prefix
    found: dict[str, Step] = {"masked attention over the tree": masked_step(trainee, policy, once)}
    grouped = grouper_step(trainee, once, args.device, half)
    if isinstance(grouped, str):
        print(f"missing rival: {grouped}")
    else:
        found["PrefixGrouper"] = grouped
    if cpu:
        found |= trl_of(trainee, case, size)
    else:
        print("missing rival: TRL: compared on a CPU only")
    plain = naive_step(trainee, case.whole, size, args.device, half)
    found["naive Hugging Face"] = with_sdpa(trainee.model, plain)
    return found if cpu else that_run({name: _waited(step, wait) for name, step in found.items()})


def trl_of(trainee: Trainee, case: Case, size: int) -> dict[str, Step]:
    """TRL's trainer with its head compacted, as on a GPU."""
    try:
        from trl import GRPOTrainer
    except (ImportError, RuntimeError) as missing:  # what TRL itself lacks is a RuntimeError
        print(f"missing rival: TRL: {missing}")
        return {}
    step = trl_step(GRPOTrainer, trainee, generation(case.rows, weighted=False), size, compact=True)
    return {"TRL with a compacted head": with_sdpa(trainee.model, step)}


def that_run(steps: Mapping[str, Step]) -> dict[str, Step]:
    """The rivals whose step ends on this GPU; the others are named with their error."""
    found = {}
    for name, step in steps.items():
        try:
            step()
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # one that has no memory left is a RuntimeError
            print(f"missing rival: {name}: {' '.join(str(error).split())[:200]}")
        else:
            found[name] = step
        torch.cuda.empty_cache()
    return found


def _waited(step: Step, wait: Callable[[], None]) -> Step:
    def run() -> float | None:
        found = step()
        wait()
        return found

    return run


def kept_of(
    report: Report, args: argparse.Namespace, case: Case, checked: Mapping[str, Checked]
) -> list[str]:
    """The ways whose gradient is that of rows computed whole; the others are a miss, and have no time."""
    exact, kept = args.dtype == "float32", []
    for name, found in checked.items():
        bound = GRADIENT if exact else HALF_GRADIENT if name.startswith(OURS) else math.inf
        if name != WHOLE:
            finite = {} if bound == math.inf else {"at_most": bound}
            report.figure(
                f"{case.name}: gradient, distance from whole rows': {name}", found.distance, **finite
            )
        if found.distance <= bound:
            kept.append(name)
        else:
            print(f"no comparison: {case.name}: {name}: its gradient is {found.distance:.2g} of its size off")
    return kept


def measure_case(
    report: Report, args: argparse.Namespace, trainee: Trainee, policy: Policy, flops: ModelFlops, name: str
) -> None:
    """All figures of one shape."""
    case = case_of(args, policy, name)
    if not policy.shares:
        raise RuntimeError(f"prefixes are not shared: {policy.why_not}")
    providers = providers_of(args, trainee, policy, case)
    checked = check(args, trainee, providers)
    kept = kept_of(report, args, case, checked)
    if not {WHOLE, OURS} <= set(kept):
        return
    clock = "process" if args.device == "cpu" else "wall"
    rounds = 3 * args.rounds if name == NOTHING else args.rounds  # 2 % need more of them
    times = interleave(
        {n: providers[n] for n in kept}, rounds, warmup=0, clock=clock
    )  # the check has warmed them
    for way, found in times.items():
        report.figure(
            f"{name}: {way}", found.median, "ms", note=f"{rounds} rounds, {found.spread:.0%} spread"
        )
    measured = Comparison.of(times, OURS, WHOLE)
    if name == NOTHING:
        report.compare(f"{name}: shared / whole", measured, value=1 / measured.value, at_most=OFF_NOTHING)
        return
    report_arithmetic(report, args, case, flops, measured)
    if REPEATED in times:
        report.compare(f"{name}: prefix repeated / held", Comparison.of(times, OURS, REPEATED))
    for rival in kept:
        if not rival.startswith(OURS):
            report.compare(f"{name}: {rival} / ours", Comparison.of(times, OURS, rival))
    peak = {n: found.bytes / 1e9 for n, found in checked.items() if n in kept and n != OURS}
    ours = checked[OURS].bytes / 1e9
    report.compare(
        f"{name}: memory above weights and state, ours / whole",
        Comparison(ours, peak, unit="GB"),
        value=ours / peak[WHOLE],
        note=", ".join(f"{n} {held:.2f} GB" for n, held in {OURS: ours, **peak}.items()),
    )


def report_arithmetic(
    report: Report, args: argparse.Namespace, case: Case, flops: ModelFlops, measured: Comparison
) -> None:
    """Tokens, FLOPs and what of them the measured time has."""
    rows, name = case.rows, case.name
    once = [rows] if case.repeated is not None else list(case.shared.micro)  # a held prefix is computed once
    before = int((rows.lengths - 1).sum())
    after = sum(work.tree_of(part).tokens for part in once)
    note = f"{before} tokens, then {after}, in {len(case.whole.micro)} and {len(case.shared.micro)} micro-batches"
    report.figure(f"{name}: tokens, whole / shared", before / after, "x", note=note)
    whole = work.flops_of_rows(flops, case.whole.micro).total
    shared = work.flops_of_trees(flops, once).total
    note = f"{whole / 1e12:.3g} and {shared / 1e12:.3g} TFLOP"
    report.figure(f"{name}: arithmetic, whole / shared", whole / shared, "x", note=note)
    report.compare(f"{name}: measured, whole / shared", measured)
    bound = {"at_most": OFF_ARITHMETIC} if name == "rollouts" and not args.quick else {}
    report.figure(f"{name}: off arithmetic", whole / shared / measured.value, "x", **bound)


def measure(args: argparse.Namespace, report: Report) -> None:
    """All figures of one call, into the report."""
    torch.set_num_threads(1)
    model = make_model(args.model, args.device)
    policy = make_policy(model, settings_of(args, "auto") | {"dtype": args.dtype})
    trainee = Trainee(model, adamw(policy, 1e-6))
    trainee.fill_state()
    flops = flops_of(model.config, policy.config)[0]
    for name in args.shape:
        measure_case(report, args, trainee, policy, flops, name)


def main() -> int:
    args = arguments_of()
    report = Report("bench_prefix")
    measure(args, report)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
