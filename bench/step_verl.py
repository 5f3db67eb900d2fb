"""verl's loss path as a rival in a process of its own: its transformers is older than ours.

    parent: VerlRival(python, model, rows, ...)  ->  child: python bench/step_verl.py FOLDER

The folder has the model as transformers saves it and the rows with copies as safetensors. The child answers each line
of its input ("gradient" or "step") with a line of JSON: CPU seconds of an optimizer step and, for "gradient", which
moves no weight, the peak of memory above what it held before and the file of the gradients. What it computes is what
verl's FSDP engine does without flash-attn (which use_remove_padding needs): rows padded to their micro-batch, whole
logits, the logits of real tokens cut out and joined, `logprobs_from_logits`, and the registered loss "vanilla" with
"token-mean" over the batch. This file imports nothing of mgrpo.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

PYTHON = Path(__file__).parent.parent / ".venv-verl" / "bin" / "python"
START_LIMIT, STEP_LIMIT = 240.0, 1800.0  # seconds


class VerlRival:
    """The child, from its start to its end; a context manager. Calling it takes an optimizer step and returns the CPU
    seconds of it. Raises RuntimeError where the child ends or does not answer in time."""

    def __init__(
        self,
        model: Any,
        rows: dict[str, torch.Tensor],
        settings: dict[str, float],
        python: Path = PYTHON,
    ) -> None:
        """rows: ids i64 (R, S), loss_mask bool (R, S), rollout_logprobs f32 (R, S), lengths i64 (R,), advantages f32
        (R,). settings: clip_low, clip_high, rows (of a micro-batch), and lr, weight_decay of AdamW."""
        from safetensors.torch import save_file

        if not python.exists():
            raise FileNotFoundError(f"{python} does not exist (make verl builds it)")
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        model.save_pretrained(folder / "model")
        save_file({name: x.contiguous() for name, x in rows.items()}, folder / "rows.safetensors")
        (folder / "settings.json").write_text(json.dumps(settings))
        self._errors = (folder / "stderr").open("w+")
        self._child = subprocess.Popen(
            [str(python), "-P", str(Path(__file__).resolve()), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        try:
            self.version = str(self._answer(START_LIMIT)["verl"])
        except RuntimeError:
            self.close()
            raise

    def __enter__(self) -> VerlRival:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self) -> float:
        return float(self._ask("step")["seconds"])

    def gradient(self) -> tuple[dict[str, torch.Tensor], float, float]:
        """(gradients by parameter name, CPU seconds, peak bytes above the base) of a step that moves no weight."""
        from safetensors.torch import load_file

        found = self._ask("gradient")
        return load_file(found["file"]), float(found["seconds"]), float(found["bytes"])

    def close(self) -> None:
        if self._child.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()  # the child reads to the end
        try:
            self._child.wait(10.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(10.0)
        if self._child.stdout:
            self._child.stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(command.encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"verl's process ended: {self._last_error()}") from None
        return self._answer(STEP_LIMIT)

    def _answer(self, limit: float) -> dict[str, Any]:
        """The child's next line that is JSON; others are verl's own notices."""
        pipe, end = self._child.stdout, time.monotonic() + limit
        assert pipe is not None
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self._child.kill()
                raise RuntimeError(f"verl's process did not answer within {limit:g} s: {self._last_error()}")
            line = pipe.readline()
            if not line:
                raise RuntimeError(f"verl's process ended: {self._last_error()}")
            if line.startswith(b'{"answer"'):
                return dict(json.loads(line)["answer"])

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else "it wrote no error"


def answer(**values: Any) -> None:
    print(json.dumps({"answer": values}), flush=True)


class Child:
    """The model, its rows and its optimizer in verl's environment."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        from verl.utils.torch_functional import logprobs_from_logits
        from verl.workers.config import ActorConfig

        self.folder = folder
        self.settings = json.loads((folder / "settings.json").read_text())
        self.rows = load_file(folder / "rows.safetensors")
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.model.train()
        self.logprobs, self.loss = logprobs_from_logits, get_policy_loss_fn("vanilla")
        low, high = self.settings["clip_low"], self.settings["clip_high"]
        self.config = ActorConfig(
            strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio=low, clip_ratio_low=low,
            clip_ratio_high=high, loss_agg_mode="token-mean",
        )  # fmt: skip
        tokens = float(self.rows["loss_mask"].sum())
        self.config.global_batch_info.update(dp_size=1, batch_num_tokens=tokens)
        lr, decay = self.settings["lr"], self.settings["weight_decay"]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=decay, foreach=True)
        for p in self.model.parameters():  # Adam's state, which the first step would make
            p.grad = torch.zeros_like(p)
        self._update(0.0)
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self) -> None:
        each = int(self.settings["rows"])
        for at in range(0, len(self.rows["lengths"]), each):
            part = {name: x[at : at + each] for name, x in self.rows.items()}
            self.micro(part).backward()

    def micro(self, part: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of one micro-batch."""
        width = int(part["lengths"].max())
        ids = part["ids"][:, :width]
        inside = torch.arange(width)[None] < part["lengths"][:, None]
        positions = torch.arange(width)[None].expand_as(ids)
        logits = self.model(
            input_ids=ids, attention_mask=inside, position_ids=positions, use_cache=False
        ).logits
        logits = torch.cat(
            [row[:length] for row, length in zip(logits, part["lengths"].tolist(), strict=True)]
        )
        rolled = torch.roll(ids[inside], shifts=-1, dims=0)
        found = logits.new_zeros(ids.shape).masked_scatter(
            inside, self.logprobs(logits=logits, labels=rolled)
        )
        mask = part["loss_mask"][:, 1:width]
        loss, _ = self.loss(
            old_log_prob=part["rollout_logprobs"][:, 1:width],
            log_prob=found[:, :-1],
            advantages=part["advantages"][:, None].expand_as(mask),
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=self.config,
        )
        return loss

    def step(self, lr: float, clip: float = 1.0) -> float:
        """CPU seconds of it."""
        start = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip, foreach=True)
        self._update(lr)
        return time.process_time() - start

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def gradient(self) -> None:
        """Neither weights nor gradients are changed by a bound of the clip: a wrong scale would be hidden."""
        from safetensors.torch import save_file

        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        base = _resident("VmRSS") if _reset_peak() else float("nan")
        seconds = self.step(0.0, clip=float("inf"))
        peak = _resident("VmHWM") - base
        path = self.folder / "gradient.safetensors"
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        save_file(grads, path)
        answer(seconds=seconds, bytes=peak, file=str(path))


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024.0


def main() -> int:
    import verl

    torch.set_num_threads(1)
    child = Child(Path(sys.argv[1]))
    answer(verl=verl.__version__)
    for line in sys.stdin:
        if line.strip() == "gradient":
            child.gradient()
        else:
            answer(seconds=child.step(child.settings["lr"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
