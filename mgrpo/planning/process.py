"""What the process of a trainer on the CPU holds beside its tensors: interpreter, libraries, kernels that were used.

It is measured, on this machine and with its versions of the libraries: a process of its own imports what a trainer
imports, takes a step with a model of a few thousand parameters, and says what it holds. Pages of libraries that several
processes share count in each.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

from mgrpo.errors import ConfigError

_SECONDS = 600.0  # until a start of Python that does not end is given up


@functools.cache
def process_bytes() -> int:
    """Resident bytes of a trainer's process without a model, with all that ranks and adapters load. Raises ConfigError
    where it cannot be measured."""
    command = [sys.executable, "-m", "mgrpo.planning.process"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return int(found.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or ""
        last = said.strip().splitlines()[-1:] or [str(error)]
        raise ConfigError(f"the memory of a process without a model cannot be measured: {last[0]}") from error


def resident() -> int:
    """Bytes of this process in main memory, pages of files among them."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def main() -> None:
    """One step of a tiny model, by what a trainer uses."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from mgrpo.planning.fake import fake_ranks
    from mgrpo.trainers.torch import trainer  # noqa: F401 - with all that it imports
    from mgrpo.trainers.torch.heap import return_freed_memory

    return_freed_memory()
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    with contextlib.suppress(ImportError):  # only adapters need the package
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    with fake_ranks(2):
        fully_shard(model)
        model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True).step()
    print(resident())


if __name__ == "__main__":
    main()
