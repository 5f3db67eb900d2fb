"""A whole optimizer step of a real-sized model without rollouts: forward, loss, backward, clip, AdamW.

    python -m bench.bench_train_step [--model smollm2|llama-1b|qwen3-0.6b|qwen3-8b] [--tokens 16384] [--lora RANK]
        [--checkpointing] [--compile] [--ours-only] [--plan] [--device cpu|cuda] [--json PATH]

Random weights in the model's shape; trajectories of 221 to 643 tokens of which 42 % are masked and 29 % have advantage
0, as a step of examples/smollm2 has; their log-probs are the model's own and a little noise, as a sampler's are, so
that no ratio is near a bound of the clip, where rounding would choose which tokens train. Rival: transformers' own
model on padded rows, log-softmax of all logits, autograd through it. On a GPU bfloat16 over float32 weights (the
rival's by autocast), wall time; on the CPU float32, process time. All ways start from the same weights and their
gradients are compared before anything is timed.

--plan: beside the memory of the step, what `mgrpo plan` predicts for it (planned.py): for as many tokens as the largest
micro-batch computes, and for one that is full, which is what the command plans for. qwen3-8b trained whole takes 131
GB of weights, gradients and Adam's state, more than one GPU of 80 GB has: there give --lora 16 --checkpointing
--ours-only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bench.common import Report, interleave, parser, ratio
from bench.planned import planned_bytes
from bench.rivals import PeakMemory, that_fit
from mgrpo import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.model import attention
from mgrpo.model.attention import PACKED
from mgrpo.model.policy import Policy
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, adamw, logprobs_of

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny-qwen3": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
}  # fmt: skip
UNTIED = ("qwen3-8b",)
"""Whose head is no embedding."""
PEAK_TFLOPS = {"NVIDIA H100": 989.0, "NVIDIA H200": 989.0, "NVIDIA A100": 312.0}
"""Dense bfloat16 products of a device; another device has no MFU."""
LOSS = GrpoLossConfig(type="dapo", clip_eps_high=0.28)
NOISE = 0.02
"""Standard deviation of what a sampler's log-probs are off by, in nats: a tenth of the way to a bound of the clip."""


def make_model(name: str, device: str) -> Any:
    """Random weights of the shape, float32."""
    torch.manual_seed(0)
    more = {"max_position_embeddings": 2048, "tie_word_embeddings": name not in UNTIED}
    with torch.device(device):
        if "qwen3" in name:
            return Qwen3ForCausalLM(Qwen3Config(**SHAPES[name], **more))
        return LlamaForCausalLM(LlamaConfig(**SHAPES[name], **more))


def settings_of(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The agent's `policy` settings. kind: of attention."""
    out: dict[str, Any] = {"device": args.device, "attention": kind}
    out["dtype"] = "float32" if args.device == "cpu" else "bfloat16"
    if args.lora:
        out["lora"] = {"rank": args.lora, "alpha": 2.0 * args.lora}
    if args.checkpointing:
        out["gradient_checkpointing"] = True
    if args.compile:
        out["compile"] = True
    return out


def make_policy(model: Any, settings: dict[str, Any]) -> Policy:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    return Policy(
        model, PreTrainedTokenizerFast(tokenizer_object=words), "bench", PolicyConfig.model_validate(settings)
    )


def make_rows(tokens: int, vocabulary: int) -> MicroBatch:
    """About `tokens` tokens of distinct trajectories, sampled by a uniform policy (`sample` puts in the model's own
    log-probs)."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(221, 644, (max(2, tokens // 432),), generator=g)
    shape = (len(lengths), int(lengths.max()))
    inside = torch.arange(shape[1])[None] < lengths[:, None]
    mask = inside & (torch.arange(shape[1])[None] % 100 >= 42)
    advantages = torch.randn(shape[0], generator=g)
    advantages[torch.arange(shape[0]) % 7 < 2] = 0.0  # 29 %
    near = -torch.full(shape, float(torch.tensor(vocabulary).log()))
    ids = torch.randint(vocabulary, shape, generator=g)
    return MicroBatch(ids, mask, near, lengths, advantages, torch.ones(shape[0]))


def cut(rows: MicroBatch, size: int) -> list[MicroBatch]:
    """Micro-batches of at most `size` padded tokens, longest rows first, as the batcher cuts them."""
    order = rows.lengths.argsort(descending=True)
    parts, at = [], 0
    while at < len(order):
        n = max(1, size // int(rows.lengths[order[at]]))
        parts.append(rows.rows(torch.isin(torch.arange(len(order)), order[at : at + n])))
        at += n
    return parts


def sample(policy: Policy, micro: list[MicroBatch]) -> None:
    """Write the policy's own log-probs into the rollout's, NOISE off."""
    g = torch.Generator().manual_seed(2)
    for rows in micro:
        found = logprobs_of(policy, rows, LOSS.temperature).cpu()
        noise = NOISE * torch.randn(found.shape, generator=g)
        rows.rollout_logprobs[:, 1:][rows.active().mask] = found + noise


def computed_tokens(micro: list[MicroBatch], packed: bool) -> int:
    """Tokens of the largest micro-batch that go through the model: trajectories without an advantage stay out. Padded
    ones unless they are packed."""
    kept = [rows.rows(rows.with_advantage()).lengths for rows in micro]
    return max(int(x.sum()) if packed else int(x.max()) * len(x) for x in kept if len(x))


def naive_loss(model: Any, rows: MicroBatch, denominator: float, device: str) -> torch.Tensor:
    """The clipped loss of padded rows as a plain loop writes it: whole logits, log-softmax, autograd."""
    ids, lengths = rows.ids.to(device), rows.lengths.to(device)
    inside = torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]
    logits = model(input_ids=ids, attention_mask=inside.long(), use_cache=False).logits[:, :-1]
    logp = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    a = rows.advantages.to(device)[:, None]
    rate = (logp - rows.rollout_logprobs.to(device)[:, 1:]).exp()
    held = rate.clamp(1 - LOSS.clip_eps_low, 1 + LOSS.clip_eps_high)
    loss = -torch.minimum(rate * a, held * a) * rows.loss_mask[:, 1:].to(device)
    return loss.sum() / denominator


def arguments_of() -> argparse.Namespace:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", default="smollm2", choices=list(SHAPES))
    arguments.add_argument("--tokens", type=int, default=16384)
    arguments.add_argument("--micro-batch", type=int, default=16384, help="padded tokens of a micro-batch")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank alone"
    )
    arguments.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    arguments.add_argument(
        "--compile", action="store_true", help="policy.compile: torch.compile of each layer"
    )
    arguments.add_argument("--ours-only", action="store_true", help="no rival, no padded rows")
    arguments.add_argument("--plan", action="store_true", help="compare the memory with what mgrpo plan says")
    args = arguments.parse_args()
    args.ours_only |= args.lora > 0 or args.compile  # the rival has no adapters, and would be compiled too
    return args


def main() -> int:
    args = arguments_of()
    cpu = args.device == "cpu"
    torch.set_num_threads(1)
    report = Report("bench_train_step")
    model = make_model(args.model, args.device)
    packed = make_policy(model, settings_of(args, "auto"))
    rows = make_rows(args.tokens, model.config.vocab_size)
    micro = cut(rows, args.micro_batch)
    sample(packed, micro)
    denominator = float(rows.loss_mask.sum())
    optimizer = adamw(packed, 1e-6)
    wait = (lambda: None) if cpu else torch.cuda.synchronize

    learner, best = Learner(packed, optimizer, LOSS, 1.0), packed.attention

    def ours(kind: attention.Kind) -> Callable[[], object]:
        def step() -> None:
            model.set_attn_implementation("sdpa")
            attention.use(model, kind)
            packed.attention = kind
            learner.step(MiniBatch(micro, denominator))
            wait()

        return step

    def naive() -> None:
        model.set_attn_implementation("sdpa")
        optimizer.zero_grad(set_to_none=True)
        for part in micro:
            with packed.full_precision(), torch.autocast(args.device, torch.bfloat16, enabled=not cpu):
                loss = naive_loss(model, part, denominator, args.device)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        wait()

    providers: dict[str, Callable[[], object]] = {f"ours, {best}": ours(best)}
    if not args.ours_only:
        providers |= {"ours, padded rows": ours("sdpa"), "naive Hugging Face": naive}
    if not cpu:
        providers = that_fit(providers)
    compare(report, model, providers, optimizer, cpu)
    times = interleave(providers, rounds=2 if args.quick else args.rounds, clock="process" if cpu else "wall")
    flops = flops_of(model, rows, whole=not args.lora)
    for name, t in times.items():
        note = f"{args.model}, {int(rows.lengths.sum())} tokens, {t.spread:.0%} spread"
        report.figure(name, t.median, "ms", note=note)
        report.figure(f"tokens/s: {name}", float(rows.lengths.sum()) / t.median * 1e3)
    mine = next(iter(times))
    report.figure("TFLOP/s of the rows that train: ours", flops / times[mine].median / 1e9)
    if not cpu and (peak := peak_of(torch.cuda.get_device_name())):
        report.figure("MFU: ours", flops / times[mine].median / 1e9 / peak, note=f"of {peak:g} TFLOP/s")
    if "naive Hugging Face" in times:
        report.figure("naive / ours", ratio(times, "naive Hugging Face", mine), "x")
    held = 0.0
    for name, provider in providers.items():
        with PeakMemory(args.device) as memory:
            provider()
        report.figure(f"peak memory above base: {name}", memory.bytes / 1e6, "MB")
        if not cpu and name == mine:
            held = torch.cuda.max_memory_allocated()
            report.figure("memory of the step, weights and state included: ours", held / 1e9, "GB")
    if args.plan:
        report_plan(report, model, args, computed_tokens(micro, best in PACKED), held)
    return report.finish(args)


def report_plan(report: Report, model: Any, args: argparse.Namespace, tokens: int, held: float) -> None:
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


def compare(
    report: Report,
    model: Any,
    providers: dict[str, Callable[[], object]],
    optimizer: torch.optim.Optimizer,
    cpu: bool,
) -> None:
    """How far each way's gradient is from the first one's, relative to its size; no weight moves meanwhile. In half
    precision the rival rounds its logits, which ours does not, so it has no bound there."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    first: list[torch.Tensor] = []
    for name, provider in providers.items():
        provider()
        seen = [p.grad for p in model.parameters() if p.grad is not None]
        if not first:
            first = [g.cpu() for g in seen]  # a GPU has no room for two of them
            continue
        off = sum(
            float((a - b.to(a.device)).double().square().sum()) for a, b in zip(seen, first, strict=True)
        )
        size = sum(float(b.to(a.device).double().square().sum()) for a, b in zip(seen, first, strict=True))
        bound = {"at_most": 1e-5 if cpu else 0.02} if cpu or name.startswith("ours") else {}
        report.figure(f"gradient, distance from ours: {name}", (off / size) ** 0.5, **bound)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def flops_of(model: Any, rows: MicroBatch, whole: bool) -> float:
    """Forward and backward of the rows that have an advantage: backbone weights, causal attention, and the head for the
    tokens that are scored. Each product counts 2 forward and 4 backward, 2 backward where its weight is frozen (whole
    is false: adapters train); what is computed twice counts once."""
    c = model.config
    kept = rows.rows(rows.advantages != 0)
    tokens, squares = float(kept.lengths.sum()), float(kept.lengths.double().square().sum())
    backbone = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "layers" in name and "lora" not in name and p.dim() == 2
    )
    width = c.num_attention_heads * getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
    attended = 2 * c.num_hidden_layers * width * squares / 2
    head = float(kept.loss_mask.sum()) * c.hidden_size * c.vocab_size
    return (6 if whole else 4) * (backbone * tokens + head) + 6 * attended


def peak_of(device: str) -> float | None:
    """TFLOP/s of dense bfloat16 products; None for a device that is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if device.startswith(name)), None)


if __name__ == "__main__":
    sys.exit(main())
