"""Peak memory of a training step with the vocabulary head and the loss, and without them.

    python -m bench.bench_head_memory [--quick] [--json out.json]

A Llama of SmolLM2-135M's shape (30 layers of 576, 49,152 tokens, tied head), random weights, float32, AdamW, one packed
batch whose every token is sampled: two optimizer steps, each in a process of its own that reports its peak resident
memory. "Without" replaces head and loss by a sum over the hidden states. The rival multiplies the hidden states by the
head as usual and takes log_softmax of all logits.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from bench.common import Comparison, Report, parser

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 1800
KINDS = ("none", "fused", "logits")


def child(kind: str, tokens: int, layers: int, recompute: bool) -> float:
    """Peak resident memory in GB of two optimizer steps in this process."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from mgrpo.config.loss import GrpoLossConfig
    from mgrpo.config.policy import PolicyConfig
    from mgrpo.model.policy import Policy
    from mgrpo.trainers.batch import MicroBatch, MiniBatch
    from mgrpo.trainers.torch.learner import Learner

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    vocabulary = {str(i): i for i in range(config.vocab_size)}
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")))
    held = PolicyConfig(attention="varlen", gradient_checkpointing=recompute)
    policy = Policy(LlamaForCausalLM(config), words, "bench", held)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, foreach=True)
    width = 257  # 256 positions enter the model, the last token is only a target
    rows = tokens // 256
    mask = torch.ones(rows, width, dtype=torch.bool)
    mask[:, 0] = False
    batch = MicroBatch(
        ids=torch.randint(0, 49_152, (rows, width)),
        loss_mask=mask,
        rollout_logprobs=torch.full((rows, width), -10.8),
        lengths=torch.full((rows,), width),
        advantages=torch.randn(rows) + 2.0,
        weights=torch.ones(rows),
    )
    learner = Learner(policy, optimizer, GrpoLossConfig(), 1.0)
    for _ in range(2):
        if kind == "fused":
            learner.step(MiniBatch([batch], float(rows)))
            continue
        optimizer.zero_grad(set_to_none=True)
        hidden = policy.hidden_before(batch.ids, batch.lengths, mask[:, 1:])
        if kind == "none":
            loss = hidden.mean()
        else:
            logp = torch.log_softmax(hidden @ policy.head_weight.T, -1)
            loss = -logp.gather(1, batch.ids[:, 1:].reshape(-1, 1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, foreach=True)
        optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(kind: str, tokens: int, layers: int = 30, recompute: bool = False) -> float:
    """child() in a process of its own."""
    command = [sys.executable, "-m", "bench.bench_head_memory", "--child", kind]
    command += ["--tokens", str(tokens), "--layers", str(layers)] + ["--recompute"] * recompute
    done = subprocess.run(
        command, cwd=ROOT, timeout=DEADLINE_SECONDS, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def run(report: Report, tokens: int, recompute: bool) -> None:
    name = f"{tokens} tokens" + (", layers recomputed" if recompute else "")
    peaks = {kind: measure(kind, tokens, recompute=recompute) for kind in KINDS}
    report.figure(f"without head, {name}", peaks["none"], "GB")
    report.figure(f"fused head and loss, {name}", peaks["fused"], "GB")
    report.figure(f"whole logits, {name}", peaks["logits"], "GB")
    bound = {} if recompute else {"at_most": 1.15}
    whole = {"whole logits": peaks["logits"]}
    compared = Comparison(peaks["fused"], whole, floor=peaks["none"], floor_name="without head", unit="GB")
    report.compare(f"fused over without, {name}", compared, value=peaks["fused"] / peaks["none"], **bound)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    arguments.add_argument("--tokens", type=int, default=4096, help=argparse.SUPPRESS)
    arguments.add_argument("--layers", type=int, default=30, help=argparse.SUPPRESS)
    arguments.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.child:
        print(child(args.child, args.tokens, args.layers, args.recompute))
        return 0
    report = Report("bench_head_memory")
    run(report, 1024 if args.quick else 4096, recompute=False)
    if not args.quick:
        run(report, 4096, recompute=True)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
