"""The folder through which servers get new weights: one subfolder a version, and a lock for each server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import safetensors.torch
from filelock import AsyncFileLock, Timeout

from mgrpo.config.policy import LoraConfig
from mgrpo.engines.labels import Label, parse_label
from mgrpo.errors import DeadlineError

KEEP = 3  # versions on disk, and adapters in a server: a slower worker may still be at the one before


class WeightFolder:
    """Shared with the servers and with the other workers."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, label: Label) -> Path:
        """Where a version lies."""
        return self.root / str(label)

    def write(self, label: Label, files: dict[str, bytes]) -> None:
        """Write a version's folder, complete or absent at every moment, and remove what nobody needs any more."""
        target = self.path(label)
        if target.exists():
            return
        # Engines of one process write versions side by side, so its number would not keep them apart.
        fresh = self.root / f".{label}.{uuid.uuid4().hex}"
        fresh.mkdir(parents=True)
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        # Not synced to disk: a version is of use to servers that run now, and a power cut ends those too.
        try:
            fresh.rename(target)
        except OSError:  # another worker was faster
            shutil.rmtree(fresh)
            if not target.exists():
                raise
        self._clean()

    def _clean(self) -> None:
        """Remove all but the newest versions, and what a killed worker left unfinished of older ones."""
        versions = sorted((label, p) for p in self.root.iterdir() if (label := parse_label(p.name)))
        for _, old in versions[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
        for unfinished in self.root.glob(".*"):
            label = parse_label(unfinished.stem.removeprefix("."))
            if label is not None and versions and label < versions[-KEEP:][0][0]:
                shutil.rmtree(unfinished, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def lock(self, url: str, seconds: float) -> AsyncIterator[None]:
        """Held by one worker at a time for the server at `url`. Raises DeadlineError after `seconds`."""
        self.root.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(url.encode()).hexdigest()[:12]
        # Never by the file's existence: a killed worker would leave it. Attempts do not block, so no thread for them.
        lock = AsyncFileLock(
            self.root / f"{name}.lock", timeout=seconds, fallback_to_soft=False, run_in_executor=False
        )
        try:
            await lock.acquire()
        except Timeout:
            raise DeadlineError(f"{url}: another worker has been updating it for {seconds:g} s") from None
        try:
            yield
        finally:
            await lock.release()


def adapter_files(data: bytes, lora: LoraConfig) -> dict[str, bytes]:
    """A peft adapter's folder from the adapter's tensors. Raises ValueError when there are none among them."""
    tensors = {}
    for name, tensor in safetensors.torch.load(data).items():
        if ".lora_A." in name or ".lora_B." in name:
            plain = name.replace(".default.", ".").removeprefix("base_model.model.")
            tensors[f"base_model.model.{plain}"] = tensor.contiguous()
    if not tensors:
        raise ValueError('sync "lora": the trainer\'s weights hold no adapter (no lora_A, lora_B)')
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return {
        "adapter_config.json": json.dumps(config, indent=2).encode(),
        "adapter_model.safetensors": safetensors.torch.save(tensors),
    }
