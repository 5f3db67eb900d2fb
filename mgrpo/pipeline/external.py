"""A feed for a program of the user's, which trains one agent's policy as it likes: see mgrpo.feed.

Its checkpoints are its own. What the run must know of them is one number, kept in the agent's folder (saved.json): the
RL steps of the newest one that is durable. It is on disk before the store hears of it, so a program that comes back
goes on from the step it finds there, and what it had trained on since then is handed out again.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mgrpo.config import view_of
from mgrpo.config.policy import LoraConfig, MeshConfig, PolicyConfig
from mgrpo.environments.task import Task
from mgrpo.errors import CorruptionError, DeadlineError, MgrpoError, PeerError
from mgrpo.files import write_atomic
from mgrpo.model.chat_check import check_chat
from mgrpo.model.loading import blank_policy, load_policy
from mgrpo.model.policy import write_folder
from mgrpo.model.policy_files import policy_files
from mgrpo.model.stream import WeightStream, own_state
from mgrpo.pipeline.feed import STOP_SECONDS, Feed, FeedStep
from mgrpo.pipeline.trainer_loop import start_policy
from mgrpo.store.trainer_client import TrainerClient
from mgrpo.trainers.torch.trainer import TorchTrainer
from mgrpo.types import Probe

log = logging.getLogger("mgrpo.feed")
Weights = torch.nn.Module | Iterable[tuple[str, torch.Tensor]]
SAVED = "saved.json"


class ExternalFeed(Feed):
    """Get one from mgrpo.feed. All methods are for one thread."""

    start: Path
    """Folder of the policy to begin with, in Hugging Face's layout: agents.<role>.model, or the task's own after SFT.
    Where `step` is above 0 the weights are those of your checkpoint of so many steps."""

    def begin(self, task: Task) -> None:
        """Take the run over where the last program left it."""
        self._presence = _Presence(self._store, self.config.store.heartbeat_timeout / 4)
        self.start = self._start_policy(task)
        blank: Any = blank_policy(self.start, PolicyConfig())
        if task.chat:
            check_chat(blank.tokenizer, task.chat_use, f"policy of {self.role}")
        self._shapes = {tensor.name: tensor.shape for tensor in WeightStream(blank.model).tensors}
        self._tied = set(blank.model.state_dict()) - set(own_state(blank.model))
        self._files = policy_files(blank)
        self._stream: tuple[tuple[torch.nn.Module, tuple[str, ...]], WeightStream] | None = None
        self.describe(self._files)
        step = self._read_saved()
        requeued = self.resume(step, self.folder / SAVED)
        if step is not None:
            self.commit(step, lambda cursors: cursors)
        self.say(
            f"a program trains it through mgrpo.feed from step {self.step} on"
            + (f", {requeued} groups again" if requeued else "")
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (presence := getattr(self, "_presence", None)) is not None:
            self._store.shorten_deadlines(STOP_SECONDS)  # it may be gone
            self._ahead.close()  # a claim after the goodbye would be a sign of life
            presence.close()
        super().__exit__(kind, error, trace)

    def _start_policy(self, task: Task) -> Path:
        """SFT is done by the torch backend, in this process."""
        if self.agent.model is not None or (self.folder / "start").exists():
            return Path(self.agent.model or self.folder / "start")
        alone = {"ranks": 1, "mesh": MeshConfig(), "lora": LoraConfig(), "trainer": "torch"}
        policy = self.agent.policy.model_copy(update=alone)
        agent = self.agent.model_copy(update={"policy": policy})
        config = self.config.model_copy(update={"agents": {**self.config.agents, self.role: agent}})
        threads = torch.get_num_threads()
        with (
            torch.random.fork_rng(devices=[]),
            TorchTrainer.open(view_of(config, self.role), self.folder) as trainer,
        ):
            try:
                return start_policy(self, task, trainer)
            finally:
                trainer.close()
                torch.set_num_threads(threads)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _next(self) -> FeedStep:
        if self._version is None:
            if self.step:
                raise ValueError(
                    f"feed of {self.role}: nothing was published yet: load your checkpoint of {self.step} steps "
                    "(feed.step) and call feed.publish(model) before the first step"
                )
            self.publish(load_policy(self.start).model)
        return super()._next()

    def publish(self, model: Weights, probe: Probe | None = None) -> None:
        """Serve the weights of `step` RL steps: before the first step those that it begins with (at step 0 this may be
        left out), then once a step after applied(). Engines get them in the dtype they compute in.

        model: a torch module whose state dict has the names of the start policy's checkpoint (a transformers model,
        also with peft's adapters, compiled or in DistributedDataParallel), or an iterable of (name, whole tensor) in
        any order. Tied weights may come once or twice. probe: what engines that compare (SGLang, vLLM) are compared
        with; None: they are not. Raises ValueError naming the tensor; then the version before stays."""
        tensors = self._tensors_of(model) if isinstance(model, torch.nn.Module) else model
        super().publish(self._checked(tensors), probe)

    def _tensors_of(self, model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
        plain = _unwrapped(model)
        if any(hasattr(tensor, "full_tensor") for tensor in plain.parameters()):
            raise ValueError(
                f"feed of {self.role}: publish() was given a module whose weights are divided over ranks (DTensor); "
                "give it an iterator of (name, whole tensor)"
            )
        if not hasattr(plain, "save_pretrained"):
            return own_state(plain).items()
        structure = plain, tuple(own_state(plain))  # adapters may have been put into it meanwhile
        if self._stream is None or self._stream[0] != structure:
            self._stream = structure, WeightStream(plain)
        return self._stream[1].read()

    def _checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        missing = dict(self._shapes)
        where = f"feed of {self.role}: the weights of step {self.step}"
        for name, tensor in tensors:
            if name not in self._shapes:
                if name in self._tied:
                    continue
                raise ValueError(f"{where} have {name!r}, which the policy in {self.start} has not")
            if tuple(tensor.shape) != self._shapes[name]:
                raise ValueError(
                    f"{where} have {name!r} in shape {tuple(tensor.shape)}, expected {self._shapes[name]}"
                )
            if missing.pop(name, None) is None:
                raise ValueError(f"{where} have {name!r} twice")
            yield name, tensor
        if missing:
            raise ValueError(f"{where} lack {next(iter(missing))!r} ({len(missing)} tensors are missing)")

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def saved(self, step: int) -> None:
        """Your checkpoint of `step` RL steps, optimizer and all, is durable. From now on a restart goes on there; keep
        the checkpoint before it until this has returned. Raises ValueError for a step that was not applied, or that
        is older than what was saved before."""
        if not self.saved_step <= step <= self.step:
            raise ValueError(
                f"feed of {self.role}: saved({step}): expected a number of steps from {self.saved_step} (saved before) "
                f"to {self.step} (applied)"
            )
        if step and step > self.saved_step:
            with self.part("checkpoint"):
                self._write_saved(step)
                self.commit(step, lambda cursors: cursors)

    def _read_saved(self) -> int | None:
        path = self.folder / SAVED
        try:
            step = json.loads(path.read_text())["step"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"{path}: unreadable ({error})") from None
        if type(step) is not int or not 0 < step <= self.config.trainer.steps:
            raise CorruptionError(f"{path}: step is {step!r}, expected 1 to {self.config.trainer.steps}")
        return step

    def _write_saved(self, step: int) -> None:
        # The record of these steps comes first, as commit() has it.
        self.end_step(upto=step)
        write_atomic(self.folder / SAVED, json.dumps({"step": step}))

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """After the loop: where all steps are done, keep the final policy and serve it until the run is over."""
        self.end_step(upto=self.step)
        self.flush()
        if self.stopped or self.step < self.config.trainer.steps:
            return
        write_folder(self.folder / "final", self._write_final)
        self.say(f"final policy in {self.folder / 'final'}")
        try:
            self.serve()
        except (DeadlineError, PeerError) as error:  # all steps are done and published: nothing is lost
            log.warning("the store is gone: %s", error)

    def _write_final(self, folder: Path) -> None:
        for name, data in self._files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        with (folder / "model.safetensors").open("wb") as file:
            for piece in self._weights.newest():
                file.write(piece)


class _Presence:
    """Signs of life to the store, by which the launcher knows that the program is there."""

    def __init__(self, store: TrainerClient, seconds: float) -> None:
        self._store, self._seconds, self._ended = store, seconds, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="mgrpo-presence", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            try:
                self._store.world()
            except MgrpoError as error:
                log.warning("no sign of life to the store: %s", error)
            if self._ended.wait(self._seconds):
                return

    def close(self) -> None:
        """And say goodbye, where the store still listens."""
        self._ended.set()
        self._thread.join(STOP_SECONDS)
        try:
            self._store.leave()
        except MgrpoError as error:
            log.info("the store did not learn that this trainer leaves: %s", error)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model below torch.compile, DistributedDataParallel and peft."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            inner = model.module
        elif hasattr(model, "peft_config") and (base := getattr(model, "get_base_model", None)) is not None:
            inner = base()
        if not isinstance(inner, torch.nn.Module) or inner is model:
            return model
        model = inner
