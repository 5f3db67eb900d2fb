"""Memory of a policy on two ranks: load, a training step, publish, checkpoint, export; the most of each rank.

    python -m bench.bench_shards [--quick] [--layers N] [--train lora|last|all] [--against TREE] [--json PATH]

A Llama of 1.2 B parameters in 26 layers with random weights (--quick: 11 M), bfloat16 on disk; two ranks over gloo on
this machine, one thread each; the trainer's own calls. Resident memory, file pages aside, is read every 10 ms, so a
peak that is shorter is missed; the kernel's own high-water mark (with file pages) is noted beside it. Unit of the
ratios: the whole model in float32 and a rank's share of AdamW's two moments of what trains. --against: a checkout of
another commit, with its extension built, whose trainer does the same.

What trains: adapters of rank 16 on bfloat16 (lora), the last 4 layers in float32 (last), everything in float32 (all:
the gradient and AdamW's state alone are 1.5 times the model's share, and 1.2 B do not fit 24 GB twice).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RANKS = 2
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 26, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
QUICK = SHAPE | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 14, "vocab_size": 4000}
TRAIN = {
    "lora": ("policy.lora.rank=16", 'policy.dtype="bfloat16"'),
    "last": ("policy.last_layers=4",),
    "all": (),
}
PHASES = ("load", "step", "publish", "checkpoint", "export")
DEADLINE = 3000.0


def main() -> int:
    from bench.common import Report, parser

    p = parser(__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("--train", choices=list(TRAIN), default="lora")
    p.add_argument("--against", metavar="TREE", help="a checkout of another commit")
    p.add_argument("--layers", type=int, default=26, help="decoder layers, where memory is short")
    args = p.parse_args()
    report = Report("bench_shards")
    with tempfile.TemporaryDirectory(prefix="mgrpo-shards-") as name:
        folder = Path(name)
        size = ["--quick"] if args.quick else ["--layers", str(args.layers)]
        run(ROOT, ["--make", str(folder / "policy"), *size])
        trees = {"": ROOT} | ({" (other)": Path(args.against).resolve()} if args.against else {})
        for suffix, tree in trees.items():
            found = ranks(tree, folder, folder / f"run{suffix.strip(' ()')}", args.train)
            unit = found[0]["whole"] + found[0]["adam"]
            for phase in PHASES:
                most = max(found, key=lambda rank: rank[phase][0])
                report.figure(
                    f"{phase}{suffix}",
                    most[phase][0] / unit,
                    "x",
                    at_most=None if suffix or args.quick else 0.65,
                    note=f"{most[phase][0] / 1e9:.2f} GB, with file pages {most[phase][1] / 1e9:.2f}, "
                    f"{max(rank[phase][2] for rank in found):.0f} s",
                )
            report.figure(
                f"before{suffix}", found[0]["before"] / 1e9, "GB", note="python, torch, transformers"
            )
    report.figure("whole float32 model", found[0]["whole"] / 1e9, "GB")
    report.figure("AdamW's share of a rank", found[0]["adam"] / 1e9, "GB")
    return report.finish(args)


def run(tree: Path, arguments: list[str], env: dict[str, str] | None = None) -> None:
    """This file in a process of its own, with the package of `tree`."""
    subprocess.run(
        *command(tree, arguments), env=environment(tree) | (env or {}), check=True, timeout=DEADLINE
    )


def command(tree: Path, arguments: list[str]) -> tuple[list[str]]:
    return ([sys.executable, str(Path(__file__).resolve()), *arguments],)


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def ranks(tree: Path, folder: Path, out: Path, train: str) -> list[dict[str, Any]]:
    """What each of the ranks found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["--rank", str(folder / "policy"), str(out), train]
    processes = []
    try:
        for rank in range(RANKS):
            own = {
                "RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            processes.append(subprocess.Popen(*command(tree, arguments), env=environment(tree) | own))
        for process in processes:
            if process.wait(DEADLINE):
                raise SystemExit(f"a rank of {tree} ended with status {process.returncode}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


# -- processes of their own ----------------------------------------------------------------------------------------


def make(folder: Path, quick: bool, layers: int) -> None:
    """Random weights in the model's shape and a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = QUICK if quick else SHAPE | {"num_hidden_layers": layers}
    config = LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size - 1)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


class Peaks:
    """The most memory of this process in each phase: (bytes without file pages, bytes with them, seconds)."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, int, float]] = {}
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self._most = max(self._most, status("RssAnon"))

    def phase(self, name: str, work: Callable[[], object]) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark begins again
        self._most, began = status("RssAnon"), time.monotonic()
        work()
        self.found[name] = (self._most, status("VmHWM"), time.monotonic() - began)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}")


def as_rank(policy: Path, out: Path, train: str) -> None:
    """One rank's life: the phases one after the other, in step with the other rank."""
    import torch

    from mgrpo.config import load_config, view_of
    from mgrpo.trainers.torch.ranks import Ranks
    from mgrpo.trainers.torch.trainer import TorchTrainer

    sets = [f"policy.ranks={RANKS}", "policy.attention='sdpa'", *TRAIN[train]]
    config = load_config(ROOT / "bench" / "waiting.toml", [f"agents.main.{one}" for one in sets])
    out.mkdir(parents=True, exist_ok=True)
    peaks = Peaks()
    with Ranks(RANKS) as ranks:
        trainer = TorchTrainer(view_of(config, "main"), out, ranks)
        before = status("RssAnon")
        ways: dict[str, Callable[[], object]] = {
            "load": lambda: trainer.load(policy),
            "step": lambda: trainer.train(batches(), recompute_old=False),
            "publish": lambda: sum(tensor.to(torch.bfloat16).numel() for _, tensor in trainer.weights()),
            "checkpoint": lambda: (trainer.save(1), trainer.saved(wait=True)),
            "export": lambda: trainer.export(out / "final"),
        }
        peaks.phase("load", ways["load"] if ranks.is_main else lambda: answer(trainer, ranks))
        model = trainer._own.policy.model
        whole = 4 * sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
        adam = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad) // RANKS
        for phase in PHASES[1:]:
            peaks.phase(phase, ways[phase] if ranks.is_main else lambda: answer(trainer, ranks))
        peaks.end()
        found = peaks.found | {"whole": whole, "adam": adam, "before": before}
        (out / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
        ranks.gather(None)


def answer(trainer: Any, ranks: Any) -> None:
    """One command of rank 0, as TorchTrainer.run_commands has it."""
    command, part = ranks.receive()
    if command == "weights":
        trainer._read(part).finish()
    elif command == "save":
        trainer._save(part)
        trainer._writer.saved(wait=True)
    elif command == "load":
        trainer._load(*part)
    else:
        trainer._train(*part)


def batches() -> Any:
    """One minibatch of two rows of 128 tokens a rank."""
    import torch

    from mgrpo.trainers.batch import MicroBatch, MiniBatch

    g = torch.Generator().manual_seed(1)
    shape = (2, 128)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, :64] = False
    micro = [
        MicroBatch(
            ids=torch.randint(0, 3000, shape, generator=g),
            loss_mask=mask,
            rollout_logprobs=-torch.full(shape, 8.0),
            lengths=torch.tensor([128, 128]),
            advantages=torch.randn(2, generator=g),
            weights=torch.ones(2),
        )
        for _ in range(RANKS)
    ]
    return [MiniBatch(micro, 4.0)]


def take_package_of(tree: str) -> None:
    """Import mgrpo from `tree`, also where an editable install, which comes before PYTHONPATH, has another one."""
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
    import mgrpo

    if not Path(mgrpo.__file__).is_relative_to(tree):
        raise SystemExit(f"mgrpo comes from {mgrpo.__file__}, not from {tree}")


def child(argv: list[str]) -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--make", type=Path)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--layers", type=int, default=0)
    p.add_argument("--rank", nargs=3)
    args = p.parse_args(argv)
    take_package_of(os.environ["PYTHONPATH"])
    if args.make:
        make(args.make, args.quick, args.layers)
    else:
        as_rank(Path(args.rank[0]), Path(args.rank[1]), args.rank[2])


if __name__ == "__main__":
    if {"--make", "--rank"} & set(sys.argv):
        child(sys.argv[1:])
    else:
        sys.exit(main())
