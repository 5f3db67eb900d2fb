"""`mgrpo plan` against trainers that run: predicted peaks and the resident memory of real processes.

    python -m bench.bench_plan                 trainers of models of 80-110 million parameters, < 3 GB
    python -m bench.bench_plan --quick         the same with small models, whose figures say little
    python -m bench.bench_plan --only LoRA     the cases with this in their name

A child process loads the policy from a folder, takes two steps like those that the plan imagines (optimizer state and a
first gradient are there), and reports the highest resident memory of these steps, by the kernel's own count. Predicted
is the peak of tensors and what `mgrpo plan` measures of a process without a model on this machine. With two ranks the
larger one counts. Nothing of the plan was fitted to any of the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.bench_shards import status
from bench.common import Report, parser

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "tests" / "relay.toml"
CLOSE = 0.10
CHILD_SECONDS = 1800
DENSE: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "head_dim": 64,
}
OTHER = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "full, 1 rank": ("Qwen3", ()),
    "full with recomputing, 2 ranks": ("Qwen3", ("ranks=2", "gradient_checkpointing=true")),
    "LoRA, 1 rank": ("Qwen3", ("lora.rank=16", "gradient_checkpointing=true")),
    "last layers in bfloat16, 1 rank": ("Qwen3", ("last_layers=4", 'dtype="bfloat16"')),
    "mixture of experts, 1 rank": ("Qwen3Moe", ("gradient_checkpointing=true",)),
    "tied head, packed rows, 1 rank": ("Llama", ('attention="varlen"',)),
    "LoRA with recomputing, bfloat16, 2 ranks": (
        "Llama",
        ("ranks=2", "lora.rank=8", 'dtype="bfloat16"', "gradient_checkpointing=true"),
    ),
}
BATCH = ("agents.main.max_length=256", "trainer.micro_batch=1024")


def write_model(folder: Path, name: str, quick: bool) -> None:
    """A random model and its tokenizer."""
    import torch
    import transformers

    from tests.models import tiny_tokenizer

    changes = {**DENSE, **(EXPERTS if "Moe" in name else {"head_dim": 64})}
    changes |= (OTHER if name == "Llama" else {}) | (SMALL if quick else {})
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**changes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer(changes["vocab_size"] - 8).save_pretrained(folder)


def sets_of(folder: Path, policy: tuple[str, ...]) -> list[str]:
    own = [f"agents.main.policy.{setting}" for setting in policy]
    return [f'agents.main.model="{folder}"', "agents.main.sft.steps=0", *BATCH, *own]


def forget() -> None:
    """Let the kernel's count of the most begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def as_child(out: Path, sets: list[str]) -> None:
    """One rank: the most that it holds in two steps."""
    from mgrpo.config import load_config, view_of
    from mgrpo.trainers.torch import trainer  # noqa: F401 - a trainer has imported it
    from mgrpo.trainers.torch.ranks import Ranks
    from tests.plan_ranks import learner_of

    view = view_of(load_config(CONFIG, sets), "main")
    with Ranks(view.ranks) as ranks:
        learner, batch = learner_of(view, ranks)
        forget()
        for _ in range(2):
            learner.train([batch], False)
        found = max(ranks.gather(status("VmHWM")))
        if ranks.is_main:
            out.write_text(json.dumps(found))


def measured(sets: list[str], ranks: int) -> int:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        out = Path(folder) / "out"
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        children = []
        for rank in range(ranks):
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            if ranks > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [
                sys.executable,
                "-m",
                "bench.bench_plan",
                "--child",
                str(out),
                *(f"--set={s}" for s in sets),
            ]
            children.append(subprocess.Popen(command, env=env, cwd=ROOT))
        try:
            for child in children:
                if child.wait(CHILD_SECONDS):
                    raise RuntimeError(f"a trainer ended with status {child.returncode}")
        finally:
            for child in children:
                child.kill()
                child.wait()
        return int(json.loads(out.read_text()))


def predicted(sets: list[str]) -> int:
    from mgrpo.config import load_config, view_of
    from mgrpo.planning.step import plan_step

    view = view_of(load_config(CONFIG, sets), "main")
    return plan_step(Path(view.agent.model or ""), view, "agents.main.model")[0].peak


def run(args: argparse.Namespace) -> int:
    from mgrpo.planning.process import process_bytes

    report = Report("bench_plan")
    with tempfile.TemporaryDirectory() as root:
        for name, (kind, policy) in CASES.items():
            if args.only and args.only not in name:
                continue
            folder = Path(root) / kind
            if not folder.exists():
                write_model(folder, kind, args.quick)
            sets = sets_of(folder, policy)
            real = measured(sets, 2 if "ranks=2" in policy else 1)
            tensors = predicted(sets)
            plan = tensors + process_bytes()
            note = f"predicted {plan / 1e9:.3f} GB, {tensors / 1e9:.3f} of them tensors; measured {real / 1e9:.3f}"
            print(f"{name}: {note}", file=sys.stderr, flush=True)  # the next one may take minutes
            report.figure(
                name, plan / real, "x of measured", at_least=1 - CLOSE, at_most=1 + CLOSE, note=note
            )
    return report.finish(args)


if __name__ == "__main__":
    p = parser(__doc__ or "")
    p.add_argument("--only", help="the cases with this in their name")
    p.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    arguments = p.parse_args()
    if arguments.child is not None:
        as_child(arguments.child, arguments.set)
    else:
        sys.exit(run(arguments))
