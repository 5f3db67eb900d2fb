"""A whole optimizer step of a real-sized model without rollouts: forward, loss, backward, clip, AdamW.

    python -m bench.bench_train_step [--model smollm2|llama-1b] [--tokens 16384] [--device cpu|cuda] [--json PATH]

Random weights in the model's shape; trajectories of 221 to 643 tokens of which 42 % are masked and 29 % have advantage
0, as a step of examples/smollm2 has. Rival: transformers' own model on padded rows, log-softmax of all logits, autograd
through it. On a GPU bfloat16 over float32 weights (autocast for both), wall time; on the CPU float32, process time. All
ways start from the same weights and their gradients are compared before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.common import Report, interleave, parser, ratio
from bench.rivals import PeakMemory, that_fit
from mgrpo import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.model import attention
from mgrpo.model.policy import Policy
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
PEAK_TFLOPS = {"NVIDIA H100": 989.0, "NVIDIA H200": 989.0, "NVIDIA A100": 312.0}
"""Dense bfloat16 products of a device; another device has no MFU."""
LOSS = GrpoLossConfig(type="dapo", clip_eps_high=0.28)


def make_model(name: str, device: str) -> Any:
    """Random weights of the shape, float32, input and output embedding tied."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(
            LlamaConfig(**SHAPES[name], max_position_embeddings=2048, tie_word_embeddings=True)
        )


def make_policy(model: Any, device: str, kind: str) -> Policy:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    config = {"device": device, "attention": kind, "dtype": "float32" if device == "cpu" else "bfloat16"}
    return Policy(
        model, PreTrainedTokenizerFast(tokenizer_object=words), "bench", PolicyConfig.model_validate(config)
    )


def make_rows(tokens: int, vocabulary: int) -> MicroBatch:
    """About `tokens` tokens of distinct trajectories."""
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


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", default="smollm2", choices=list(SHAPES))
    arguments.add_argument("--tokens", type=int, default=16384)
    arguments.add_argument("--micro-batch", type=int, default=16384, help="padded tokens of a micro-batch")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    cpu = args.device == "cpu"
    torch.set_num_threads(1)
    report = Report("bench_train_step")
    model = make_model(args.model, args.device)
    packed, padded = make_policy(model, args.device, "auto"), make_policy(model, args.device, "sdpa")
    rows = make_rows(args.tokens, model.config.vocab_size)
    micro = cut(rows, args.micro_batch)
    denominator = float(rows.loss_mask.sum())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)
    wait = (lambda: None) if cpu else torch.cuda.synchronize

    def ours(policy: Policy) -> Callable[[], object]:
        learner = Learner(policy, optimizer, LOSS, 1.0)

        def step() -> None:
            model.set_attn_implementation("sdpa")  # the two policies share the model
            attention.use(model, policy.attention)
            learner.step(MiniBatch(micro, denominator))
            wait()

        return step

    def naive() -> None:
        model.set_attn_implementation("sdpa")
        optimizer.zero_grad(set_to_none=True)
        for part in micro:
            with torch.autocast(args.device, torch.bfloat16, enabled=not cpu):
                loss = naive_loss(model, part, denominator, args.device)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        wait()

    providers: dict[str, Callable[[], object]] = {
        f"ours, {packed.attention}": ours(packed),
        "ours, padded rows": ours(padded),
        "naive Hugging Face": naive,
    }
    if not cpu:
        providers = that_fit(providers)
    compare(report, model, providers, optimizer, cpu)
    times = interleave(providers, rounds=2 if args.quick else args.rounds, clock="process" if cpu else "wall")
    flops = flops_of(model, rows)
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
    for name, provider in providers.items():
        with PeakMemory(args.device) as memory:
            provider()
        report.figure(f"peak memory above base: {name}", memory.bytes / 1e6, "MB")
    return report.finish(args)


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


def flops_of(model: Any, rows: MicroBatch) -> float:
    """Forward and backward of the rows that have an advantage: backbone weights, causal attention, and the head for the
    tokens that are scored. Each product counts 2 forward and 4 backward."""
    c = model.config
    kept = rows.rows(rows.advantages != 0)
    tokens, squares = float(kept.lengths.sum()), float(kept.lengths.double().square().sum())
    backbone = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    attention = 2 * c.num_hidden_layers * c.hidden_size * squares / 2
    head = float(kept.loss_mask.sum()) * c.hidden_size * c.vocab_size
    return 6 * (backbone * tokens + attention + head)


def peak_of(device: str) -> float | None:
    """TFLOP/s of dense bfloat16 products; None for a device that is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if device.startswith(name)), None)


if __name__ == "__main__":
    sys.exit(main())
