"""A whole optimizer step of a real-sized model without rollouts: forward, loss, backward, clip, AdamW.

    python -m bench.bench_train_step [--model smollm2|llama-1b|qwen3-0.6b|qwen3-8b|FOLDER] [--tokens 6000]
        [--lora RANK] [--checkpointing] [--compile] [--ours-only] [--plan] [--device cpu|cuda] [--quick]
        [--rounds N] [--limit S] [--json PATH]

Random weights in the model's shape, and the team step of step_workload.py: 14 trajectories of 3 questions, 24 with the
copies that alignment to d_max makes of them. Their log-probs are the model's own and a little noise, as a sampler's
are, so that no ratio is near a bound of the clip, where rounding would choose which tokens train. Rivals
(step_rivals.py): TRL's GRPOTrainer as it is on a CPU and with its head compacted as on a GPU, a plain Hugging Face
loop, and verl's loss path in a process of its own; then TRL's trainer with one of our tricks after the other. All ways
start from the same weights, and a rival whose gradient is not ours (1e-5 of its size) has no time here.

On the CPU float32, one thread, process time; peak memory is that of weights, Adam's state and what the step holds above
them. On a GPU bfloat16 over float32 weights (the rival's by autocast), wall time, and the plain loop is the only rival.

--quick: 4 layers of SmolLM2's width, trajectories an eighth as long, no ladder and no verl; for `make bench-quick`.
--limit: what would begin after so many seconds is not measured, and the figures are those of what was.
--plan: beside the memory of the step, what `mgrpo plan` predicts for it (planned.py): for as many tokens as the largest
micro-batch computes, and for one that is full, which is what the command plans for. qwen3-8b trained whole takes 131
GB of weights, gradients and Adam's state, more than one GPU of 80 GB has: there give --lora 16 --checkpointing
--ours-only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.common import CLOCKS, Comparison, Report, Timing, parser, ratio
from bench.planned import planned_bytes
from bench.rivals import PeakMemory, that_fit
from bench.step_rivals import Step, Trainee, ladder_steps, naive_step, trl_steps, verl_rival
from bench.step_verl import VerlRival
from bench.step_workload import (
    LONGEST,
    LOSS,
    Team,
    computed_tokens,
    make_model,
    make_policy,
    make_team,
    model_name,
    settings_of,
)
from mgrpo.model import attention
from mgrpo.model.attention import PACKED
from mgrpo.model.policy import Policy
from mgrpo.trainers.torch.cost import StepMeter
from mgrpo.trainers.torch.learner import Learner, adamw

OURS = "ours"
DEFAULT_TOKENS = {"cpu": 6000, "cuda": 16384}
MICRO_BATCH = {"cpu": 8 * LONGEST, "cuda": 16384}
"""Padded tokens of a micro-batch; 8 rows are TRL's default."""
QUICK_SCALE = 1 / 8
LADDER = (
    "TRL as it is",
    "TRL's trainer with our head",
    "and weights instead of copies",
    "and no trajectories of advantage 0",
    OURS,
)
TARGETS = {"TRL as it is": 4.0, "TRL with a compacted head": 3.0}
QUICK_TARGETS = {"TRL as it is": 3.0, "TRL with a compacted head": 2.5, "naive Hugging Face": 2.0}
MEMORY_TARGET, QUICK_MEMORY_TARGET = 0.6, 0.7
GRADIENT = 1e-5
"""How far a rival's gradient may be from ours, relative to its size, on the CPU."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The first step of a provider."""

    seconds: float
    bytes: float  # at its highest, above weights and Adam's state
    distance: float  # of its gradient from ours, relative to ours


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", type=model_name, help="smollm2; a folder: its weights")
    arguments.add_argument(
        "--tokens", type=int, help="of distinct trajectories; 6000 on a CPU, 16384 on a GPU"
    )
    arguments.add_argument("--micro-batch", type=int, help="padded tokens of a micro-batch")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--limit",
        type=float,
        default=math.inf,
        metavar="S",
        help="end the rounds after S seconds from the start",
    )
    arguments.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank alone"
    )
    arguments.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    arguments.add_argument(
        "--compile", action="store_true", help="policy.compile: torch.compile of each layer"
    )
    arguments.add_argument("--ours-only", action="store_true", help="no rival, no padded rows")
    arguments.add_argument("--plan", action="store_true", help="compare the memory with what mgrpo plan says")
    args = arguments.parse_args(given)
    for name in ("tokens", "micro_batch", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            arguments.error(f"--{name.replace('_', '-')} {value} is below 1")
    args.ours_only |= args.lora > 0 or args.compile  # the rivals have no adapters, and would be compiled too
    args.is_design = args.model in (None, "smollm2") and args.tokens is None and not args.quick
    args.scale = QUICK_SCALE if args.quick and args.model is None else 1.0
    args.rounds = min(args.rounds, 2) if args.quick else args.rounds
    args.model = args.model or ("quick" if args.quick else "smollm2")
    args.tokens = args.tokens or round(DEFAULT_TOKENS[args.device] * args.scale)
    args.micro_batch = args.micro_batch or round(MICRO_BATCH[args.device] * args.scale)
    args.rows = max(1, args.micro_batch // round(LONGEST * args.scale))
    return args


def our_step(
    trainee: Trainee, policy: Policy, team: Team, kind: attention.Kind, wait: Callable[[], None]
) -> Step:
    """The project's learner; kind: of attention."""
    learner = Learner(policy, trainee.optimizer, LOSS, 1.0)

    def step() -> None:
        trainee.model.set_attn_implementation("sdpa")
        attention.use(trainee.model, kind)
        policy.attention, learner.grad_clip = kind, trainee.grad_clip
        learner.step(team.distinct)
        wait()

    return step


def providers_of(
    args: argparse.Namespace, trainee: Trainee, policy: Policy, team: Team, stack: contextlib.ExitStack
) -> dict[str, Step]:
    """All ways, ours first."""
    cpu = args.device == "cpu"
    wait = (lambda: None) if cpu else torch.cuda.synchronize
    providers = {OURS: our_step(trainee, policy, team, policy.attention, wait)}
    if args.ours_only:
        return providers

    def half() -> Any:
        both = contextlib.ExitStack()
        both.enter_context(policy.full_precision())
        both.enter_context(torch.autocast(args.device, torch.bfloat16, enabled=not cpu))
        return both

    plain = naive_step(trainee, team.copies, args.rows, args.device, half)
    if not cpu:
        print("missing rivals: TRL, verl: compared on a CPU only")
        providers["ours, padded rows"] = our_step(trainee, policy, team, "sdpa", wait)
        return that_fit({**providers, "naive Hugging Face": lambda: (plain(), wait())[1]})
    # verl before TRL: a GRPOTrainer writes the tokenizer's pad token into the model's configuration, and a model that
    # is loaded with one has no gradient for that token's embedding.
    verl = None if args.quick else verl_rival(trainee, team.copies, args.rows)
    if verl is not None:
        stack.enter_context(verl)
    providers |= trl_steps(trainee, team, args.rows)
    providers["naive Hugging Face"] = plain
    if not args.quick:
        providers |= ladder_steps(trainee, team, args.rows)
    if verl is not None:
        providers[f"verl {verl.version}"] = verl
    model = trainee.model
    for name, step in providers.items():
        if name != OURS and not isinstance(step, VerlRival):
            providers[name] = with_sdpa(model, step)
    return providers


def with_sdpa(model: Any, step: Step) -> Step:
    """The step with transformers' own attention."""

    def run() -> float | None:
        model.set_attn_implementation("sdpa")
        return step()

    return run


def timed(step: Step, clock: str) -> float:
    """Seconds of one step."""
    now = CLOCKS[clock]
    start = now()
    reported = step()
    return reported if reported is not None else (now() - start) / 1e9


def check(
    args: argparse.Namespace, trainee: Trainee, providers: Mapping[str, Step], end: float = math.inf
) -> dict[str, Checked]:
    """One step of each without a change of the weights, unclipped, since a clip would hide a wrong scale. What would
    begin after `end` (of time.monotonic()) is left out, and named."""
    model, clock = trainee.model, "process" if args.device == "cpu" else "wall"
    rates = [group["lr"] for group in trainee.optimizer.param_groups]
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.0
    trainee.grad_clip = math.inf
    found: dict[str, Checked] = {}
    ours: dict[str, torch.Tensor] = {}
    for name, step in providers.items():
        if ours and time.monotonic() > end:
            print(f"--limit {args.limit:g}: {name} is not measured")
            continue
        trainee.optimizer.zero_grad(set_to_none=True)
        if isinstance(step, VerlRival):
            try:
                seen, seconds, peak = step.gradient()
            except RuntimeError as ended:
                print(f"missing rival: {name}: {ended}")
                continue
        else:
            with PeakMemory(args.device) as memory:
                seconds = timed(step, clock)
            peak = memory.bytes
            seen = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if not ours:
            ours = {n: g.to("cpu", copy=True) for n, g in seen.items()}  # a GPU has no room for two
        found[name] = Checked(seconds, peak, distance(seen, ours))
        print(
            f"checked {name}: {seconds:.1f} s, {peak / 1e9:.2f} GB, gradient {found[name].distance:.1e} off",
            flush=True,
        )
    for group, rate in zip(trainee.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    trainee.grad_clip = 1.0
    trainee.optimizer.zero_grad(set_to_none=True)
    return found


def distance(seen: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> float:
    """Of two gradients, relative to the size of ours; infinite where they are not of the same parameters."""
    if seen.keys() != ours.keys():
        return math.inf
    off = sum(float((seen[n].cpu() - g).double().square().sum()) for n, g in ours.items())
    return float((off / sum(float(g.double().square().sum()) for g in ours.values())) ** 0.5)


def comparable(
    report: Report, args: argparse.Namespace, providers: Mapping[str, Step], checked: Mapping[str, Checked]
) -> dict[str, Step]:
    """The providers with our gradient; the others are a miss, and are not timed. In half precision the rival rounds its
    logits, which ours does not, so it has no bound there."""
    kept = {}
    for name, found in checked.items():
        off = found.distance
        bound = GRADIENT if args.device == "cpu" else 0.02 if name.startswith(OURS) else math.inf
        if name != OURS:
            finite = {} if bound == math.inf else {"at_most": bound}
            report.figure(f"gradient, distance from ours: {name}", off, **finite)
        if off <= bound:
            kept[name] = providers[name]
        else:
            print(
                f"no comparison: {name}: its gradient is {off:.2g} of its size from ours, at most {bound:g}"
            )
    return kept


def race(
    args: argparse.Namespace, providers: Mapping[str, Step], checked: Mapping[str, Checked], end: float
) -> dict[str, Timing]:
    """Times of the providers, in turn within a round. The steps of the check are the first round where a step takes
    long (there nothing is cold that takes as long as a hundredth of it). end: of time.monotonic(), where rounds end;
    one that is not whole does not count."""
    clock = "process" if args.device == "cpu" else "wall"
    counts = clock == "process" and not args.quick
    rounds = [{name: checked[name].seconds for name in providers}] if counts else []
    gc.collect()
    gc.disable()
    try:
        while len(rounds) < args.rounds:
            found: dict[str, float] = {}
            for name, step in providers.items():
                if rounds and time.monotonic() > end:
                    break
                found[name] = timed(step, clock)
                if counts:
                    print(f"{name}: {found[name]:.1f} s", flush=True)
            if len(found) < len(providers):
                print(f"--limit {args.limit:g}: {len(rounds)} of {args.rounds} rounds are whole")
                break
            rounds.append(found)
    finally:
        gc.enable()
    return {name: Timing(tuple(times[name] * 1e3 for times in rounds)) for name in providers}


def report_times(
    report: Report, args: argparse.Namespace, policy: Policy, team: Team, times: Mapping[str, Timing]
) -> None:
    """tokens/s and milliseconds of each way, MFU of ours, and the ratios with their targets."""
    tokens = team.tokens()
    for name, t in times.items():
        note = f"{args.model}, {tokens} distinct tokens, {len(t.samples)} rounds, {t.spread:.0%} spread"
        report.figure(name, t.median, "ms", note=note)
        report.figure(f"tokens/s: {name}", tokens / t.median * 1e3)
    cost = StepMeter(policy, every_row_acts=False, has_reference=False, ranks=1).cost(
        [team.distinct], False, 0.0
    )
    if math.isfinite(cost.flops):  # an architecture that is not counted has none
        rate = cost.flops / times[OURS].median * 1e3
        report.figure("TFLOP/s of the rows that train: ours", rate / 1e12)
        if math.isfinite(cost.peak_flops):
            report.figure("MFU: ours", rate / cost.peak_flops, note=f"of {cost.peak_flops / 1e12:g} TFLOP/s")
    targets = TARGETS if args.is_design else QUICK_TARGETS if args.scale < 1 else {}
    for name in times:
        if name != OURS and name not in LADDER[1:]:
            bound = {"at_least": targets[name]} if name in targets and args.device == "cpu" else {}
            report.compare(f"{name} / ours", Comparison.of(times, OURS, name), **bound)
    for above, below in itertools.pairwise(LADDER):
        if above in times and below in times and not args.quick:
            report.figure(f"ladder: {below}", ratio(times, above, below), "x", note=f"{above} / it")


def report_memory(
    report: Report, args: argparse.Namespace, trainee: Trainee, checked: Mapping[str, Checked]
) -> None:
    """Weights, Adam's state and what the step holds above them."""
    held = sum(p.nbytes for p in trainee.model.parameters())
    held += sum(
        x.nbytes for state in trainee.optimizer.state.values() for x in state.values() if torch.is_tensor(x)
    )
    for name, found in checked.items():
        report.figure(f"peak memory above base: {name}", found.bytes / 1e6, "MB")
        report.figure(
            f"peak memory: {name}", (held + found.bytes) / 1e9, "GB", note="weights and state in it"
        )
    if "TRL as it is" in checked:
        bound = MEMORY_TARGET if args.is_design else QUICK_MEMORY_TARGET if args.scale < 1 else None
        mine, theirs = ((held + checked[name].bytes) / 1e9 for name in (OURS, "TRL as it is"))
        both = Comparison(mine, {"TRL as it is": theirs}, unit="GB")
        report.compare("peak memory, ours / TRL", both, value=mine / theirs, at_most=bound)


def report_plan(report: Report, args: argparse.Namespace, model: Any, tokens: int, held: float) -> None:
    """What `mgrpo plan` says for a micro-batch of `tokens`, against the measured `held` bytes (0: not measured), and
    for one as large as it may be."""
    settings = settings_of(args, "auto")
    if planned := planned_bytes(model, settings, tokens):
        report.figure("memory of the step, by mgrpo plan", planned / 1e9, "GB", note=f"{tokens} tokens")
        if held:
            report.figure("mgrpo plan / measured", planned / held, "x", at_least=0.9, at_most=1.1)
    if full := planned_bytes(model, settings, args.micro_batch):
        note = f"{args.micro_batch} tokens"
        report.figure("memory of a full micro-batch, by mgrpo plan", full / 1e9, "GB", note=note)


def measure(args: argparse.Namespace, report: Report) -> None:
    """All figures of one call, into the report."""
    torch.set_num_threads(1)
    end = time.monotonic() + args.limit
    model = make_model(args.model, args.device)
    policy = make_policy(model, settings_of(args, "auto"))
    team = make_team(policy, args.tokens, args.micro_batch, args.scale)
    trainee = Trainee(model, adamw(policy, 1e-6))
    trainee.fill_state()
    with contextlib.ExitStack() as stack:
        best = policy.attention
        providers = providers_of(args, trainee, policy, team, stack)
        checked = check(args, trainee, providers, end)
        kept = comparable(report, args, providers, checked)
        report_times(report, args, policy, team, race(args, kept, checked, end))
        report_memory(report, args, trainee, {name: checked[name] for name in kept})
        held = 0.0
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            providers[OURS]()
            held = float(torch.cuda.max_memory_allocated())
            report.figure("memory of the step, weights and state included: ours", held / 1e9, "GB")
    if args.plan:
        report_plan(report, args, model, computed_tokens(list(team.distinct.micro), best in PACKED), held)


def main() -> int:
    args = arguments_of()
    report = Report("bench_train_step")
    measure(args, report)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
