"""What rounding to bfloat16 does to log-probs and gradients: the head by itself, and a whole policy beside its sampler.

    python -m bench.bench_precision --model models/smollm2

Errors against float64 (head) and float32 (policy), no times. The policy's part takes a folder; without it the head's
alone is printed. Bars: docs/kernels.md, error budget.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common import Report, parser
from mgrpo import GrpoLossConfig, linear_grpo_loss, selective_logprob

ROWS, WIDTH, VOCABULARY, SPREAD = 96, 4096, 32000, 0.04
PROMPTS = (
    "The capital of France is", "def quicksort(xs):", "Once upon a time there was", "Photosynthesis is the process",
    "In 1969 the first", "The best way to cook rice", "A prime number is", "Dear Sir or Madam,",
)  # fmt: skip
SAMPLED = 48  # tokens of each prompt


def rms(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def head(report: Report, rows: int, width: int, vocabulary: int) -> None:
    """Log-probs and gradients of one head by operands."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, width, generator=g),
        torch.randn(vocabulary, width, generator=g) * SPREAD,
    )
    ids = torch.randint(vocabulary, (rows,), generator=g)
    h, w = hidden.bfloat16(), weight.bfloat16()

    def logprobs(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().t()).log_softmax(1).gather(1, ids[:, None])[:, 0]

    def gradients(a: Tensor, b: Tensor, impl: str) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        ends, one = torch.tensor([0, rows], dtype=torch.int32), torch.ones(1)
        loss, _ = linear_grpo_loss(
            leaves[0], leaves[1], ids, config=GrpoLossConfig(), cu_seqlens=ends, advantages=one, impl=impl
        )
        return torch.autograd.grad(loss, leaves)

    exact, slopes = logprobs(hidden, weight), gradients(hidden.double(), weight.double(), "reference")
    found = {
        "float32": (selective_logprob(hidden, weight, ids)[0], gradients(hidden, weight, "cpu")),
        "bf16": (selective_logprob(h, weight, ids)[0], gradients(h, weight, "cpu")),
        "operands rounded, else exact": (logprobs(h, w), gradients(h.double(), w.double(), "reference")),
        "torch's bf16": (selective_logprob(h, w, ids, impl="reference")[0], gradients(h, w, "reference")),
    }
    medians = {}
    for name, (logp, (dh, dw)) in found.items():
        off = (logp.double() - exact).abs()
        medians[name] = float(off.median())
        report.figure(f"{name}: log-prob, median", medians[name], "nats")
        report.figure(f"{name}: log-prob, largest", float(off.max()), "nats")
        report.figure(f"{name}: d hidden", rms(dh, slopes[0]), "of its rms")
        report.figure(f"{name}: d weight", rms(dw, slopes[1]), "of its rms")
    share = medians["bf16"] / medians["torch's bf16"]
    report.figure("bf16 against torch's bf16, log-prob", share, "x", at_most=1.2)


def policy(report: Report, folder: str) -> None:
    """Log-probs of tokens that the model sampled, by trainers and samplers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mgrpo.config.policy import PolicyConfig
    from mgrpo.model.loading import load_policy

    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = {"max_new_tokens": SAMPLED, "min_new_tokens": SAMPLED}
        out = exact.generate(
            ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, **length
        )
        rows.append((out[0], ids.shape[1]))

    @torch.no_grad()
    def logprobs(states: Callable[[Tensor], Tensor], weight: Tensor, impl: str = "auto") -> Tensor:
        parts = [
            selective_logprob(states(row[None])[0][n - 1 : -1], weight, row[n:], impl=impl)[0]
            for row, n in rows
        ]
        return torch.cat(parts).double()

    def autocast(row: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states: Tensor = exact.model(row).last_hidden_state
        return states.float()

    def of(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda row: model.base_model(row).last_hidden_state

    found = {"autocast, float32 head": logprobs(autocast, exact.lm_head.weight)}
    for name in ("auto", "float32"):
        own = load_policy(folder, PolicyConfig(dtype="bfloat16", head_dtype=name, attention="sdpa"))
        found[f"policy, head {name}"] = logprobs(own.hidden, own.head_weight)
    others = {
        "float32": logprobs(of(exact), exact.lm_head.weight),
        "a bf16 sampler": logprobs(of(half), half.lm_head.weight),
        "a bf16 sampler with bf16 logits": logprobs(of(half), half.lm_head.weight, "reference"),
    }
    for name, mine in found.items():
        for other, theirs in others.items():
            off = mine - theirs
            report.figure(f"{name} against {other}: median", float(off.abs().median()), "nats")
            report.figure(f"{name} against {other}: mean", float(off.abs().mean()), "nats")
            report.figure(f"{name} against {other}: KL", float((off.exp() - off - 1).mean()), "nats")


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--model", help="folder of a policy")
    args: argparse.Namespace = options.parse_args()
    torch.set_num_threads(1)
    report = Report("bench_precision")
    head(report, *((16, 256, 2000) if args.quick else (ROWS, WIDTH, VOCABULARY)))
    if args.model:
        policy(report, args.model)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
