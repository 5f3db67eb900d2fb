"""Checkpoints of one trainer: a folder per step, complete or absent.

    <root>/step-00000020/{.metadata, __0_0.distcp, __1_0.distcp, ..., manifest.json, cursors.json}

In the format of torch.distributed.checkpoint: each rank writes its part of weights and optimizer state, and any number
of ranks reads it again. Held are what of the policy trains, the optimizer's state by parameter and the random
generator's; the step is the trainer's place in the store (`commit`, `resume`).

Written to a temporary folder, synced to disk, then renamed: a crash, or a full disk, leaves either the old set or the
new one. The manifest holds a checksum of every file, so that a corrupt checkpoint is named and never trained from: the
trainer goes back to the newest intact one. cursors.json says which groups' tokens that would take: those from the
index on that the store answered to the checkpoint's commit, of each role that the trainer serves.

A trainer takes a copy of its state between two steps and writes it beside the next ones (`CheckpointWriter`). What
follows a checkpoint, telling the store first of all, happens once its bytes are on disk.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import torch
from torch import Tensor

from mgrpo.errors import CheckpointError, CorruptionError, DeadlineError, MgrpoError
from mgrpo.files import sync_folder, write_atomic
from mgrpo.model.policy import Policy, trained_state
from mgrpo.trainers.base import Checkpoint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WRITE_SECONDS = 1800.0  # the longest that a checkpoint may take to reach the disk
_MANIFEST, _METADATA, _CURSORS, _RNG = "manifest.json", ".metadata", "cursors.json", "rng"
_BLOCK = 1 << 24  # bytes of a file that are summed up at a time

State = dict[str, Tensor]


# -- writing -------------------------------------------------------------------------------------------------------


def snapshot(policy: Policy, optimizer: torch.optim.Optimizer) -> State:
    """A copy, in main memory, of this rank's part of what a checkpoint holds."""
    state = _weights(policy) | _optimizer_state(policy, optimizer)
    return {name: _copied(tensor) for name, tensor in state.items()} | {_RNG: torch.get_rng_state()}


def save_checkpoint(
    root: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int
) -> Checkpoint:
    """Write step `step` durably and delete all but the last `keep`. Returns once the bytes are on disk."""
    return _write(prepare_folder(root, step), step, snapshot(policy, optimizer), keep)


def prepare_folder(root: Path, step: int) -> Path:
    """The empty folder that step `step` is written to; what an earlier crash left of it goes. For one rank, before
    any begins to write."""
    partial = root / f".step-{step:08d}.partial"
    try:
        for left in root.glob(".step-*"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        sync_folder(root.parent)
    except OSError as error:
        raise _failed(partial, error) from None
    return partial


class CheckpointWriter:
    """Writes one checkpoint at a time on a thread of its own. Every rank has one; rank 0 completes the folder."""

    def __init__(
        self, root: Path, keep: int, group: ProcessGroup | None = None, is_main: bool = True
    ) -> None:
        """group: the ranks that write together, in a process group that nothing else uses."""
        self._root, self._keep, self._group, self._is_main = root, keep, group, is_main
        self._thread: threading.Thread | None = None
        self._done: Checkpoint | None = None
        self._error: BaseException | None = None

    def begin(self, step: int, state: State) -> None:
        """Start to write `state`, which nobody changes any more. The folder is prepared, the last one is settled."""
        assert self._thread is None, "saved() comes first"
        partial = self._root / f".step-{step:08d}.partial"

        def write() -> None:
            try:
                saved = _write(partial, step, state, self._keep, self._group, self._is_main)
                self._done = saved
            except BaseException as error:  # raised again in saved(), by the thread that waits
                self._error = error

        self._thread = threading.Thread(target=write, name=f"mgrpo-checkpoint {step}", daemon=True)
        self._thread.start()

    def saved(self, wait: bool) -> Checkpoint | None:
        """The checkpoint that has become durable since the last call, or None. wait: not before the one that is being
        written is. Raises CheckpointError where it could not be, DeadlineError naming what is waited for."""
        if self._thread is None:
            return None
        self._thread.join(WRITE_SECONDS if wait else 0.0)
        if self._thread.is_alive():
            if wait:
                raise DeadlineError(f"{self._root}: a checkpoint was not on disk within {WRITE_SECONDS:g} s")
            return None
        self._thread, saved, error = None, self._done, self._error
        self._done = self._error = None
        if error is not None:
            raise error
        return saved


def _write(
    partial: Path,
    step: int,
    state: State,
    keep: int,
    group: ProcessGroup | None = None,
    is_main: bool = True,
) -> Checkpoint:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    root, final = partial.parent, partial.parent / f"step-{step:08d}"
    try:
        _expect_one_process()
        save(
            state,
            storage_writer=FileSystemWriter(partial),
            process_group=group,
            no_dist=group is None,
        )
        if not is_main:
            return Checkpoint(final, step)
        sums = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        write_atomic(partial / _MANIFEST, json.dumps({"step": step, "crc32c": sums}))
        if final.exists():  # a run that went back to an earlier checkpoint writes this step again
            final.rename(root / f".{final.name}.old")
        partial.rename(final)
        sync_folder(root)
    except (OSError, RuntimeError, CheckpointException) as error:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise _failed(final, error) from None
    _delete_others(root, step, keep)
    return Checkpoint(final, step)


def _delete_others(root: Path, step: int, keep: int) -> None:
    """All but the last `keep` up to `step`, and those beyond it: a run that went back has left their history. What
    cannot be deleted is tried again when the next one is written."""
    folders = step_folders(root)
    kept = [path for path in folders if step_of(path) <= step][-keep:]
    for path in folders:
        if path not in kept:
            with contextlib.suppress(OSError):
                path.rename(root / f".{path.name}.old")  # what is half deleted is no checkpoint
    for gone in root.glob(".step-*.old"):
        shutil.rmtree(gone, ignore_errors=True)


def note_cursors(checkpoint: Checkpoint, cursors: Mapping[str, int]) -> dict[str, int]:
    """Keep with a checkpoint the cursor of each role at its commit, and return those of the oldest checkpoint that the
    trainer may still go back to: tokens of groups below them are of no use any more. Raises CheckpointError."""
    try:
        write_atomic(checkpoint.path / _CURSORS, json.dumps(dict(cursors)))
    except OSError as error:
        raise _failed(checkpoint.path / _CURSORS, error) from None
    known = [_cursors(path) for path in step_folders(checkpoint.path.parent)]
    return {role: min(found.get(role, 0) for found in known) for role in cursors}


def _cursors(folder: Path) -> dict[str, int]:
    """{} where they are not known: then nothing is deleted as long as this checkpoint is kept."""
    try:
        found = json.loads((folder / _CURSORS).read_text())
        return {str(role): int(cursor) for role, cursor in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _failed(path: Path, error: BaseException) -> MgrpoError:
    """What went wrong, in one line: CheckpointError where the disk is to blame. Ranks report through an exception that
    holds one for each of them, and a full disk may be the cause of a cause."""
    every: list[BaseException] = [error]
    every += [failure for failure, _ in getattr(error, "failures", {}).values()]
    for one in every:  # grows
        every += [cause for cause in (one.__cause__, one.__context__) if cause and cause not in every]
    disk = next((one for one in every if isinstance(one, OSError) and one.strerror), None)
    if disk is not None:
        return CheckpointError(f"{path}: not written: {disk.strerror}; the checkpoints before it are intact")
    return MgrpoError(f"{path}: not written: {every[min(1, len(every) - 1)]}")


def _copied(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


# -- reading -------------------------------------------------------------------------------------------------------


def latest_checkpoint(root: Path, upto: int | None = None) -> Checkpoint | None:
    """The newest intact checkpoint below root (of step `upto` at most), or None where there is none at all. Raises
    CorruptionError naming what is wrong with the newest one when all are damaged."""
    damaged: list[CorruptionError] = []
    for path in reversed(step_folders(root)):
        if upto is not None and step_of(path) > upto:
            continue
        try:
            return replace(_checked(path), passed_over=tuple(str(error) for error in damaged))
        except CorruptionError as error:
            damaged.append(error)
    if damaged:
        raise damaged[0]
    return None


def _checked(path: Path) -> Checkpoint:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        step, sums = int(manifest["step"]), dict(manifest["crc32c"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptionError(f"{path / _MANIFEST}: unreadable checkpoint manifest ({error})") from None
    if _METADATA not in sums:
        raise CorruptionError(f"{path / _MANIFEST}: names no {_METADATA}, which every checkpoint has")
    for name, expected in sums.items():
        try:
            found = _checksum(path / name)
        except OSError as error:
            raise CorruptionError(f"{path / name}: missing from the checkpoint ({error.strerror})") from None
        if found != expected:
            raise CorruptionError(f"{path / name}: crc32c is {found:#010x}, expected {expected:#010x}")
    return Checkpoint(path, step)


def restore_checkpoint(
    checkpoint: Checkpoint,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    group: ProcessGroup | None = None,
) -> None:
    """Load weights and optimizer state in place, each rank its part. Raises CorruptionError naming the checkpoint and
    the first tensor of the policy that it does not hold, or holds in another shape."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint.path)
    try:
        held = reader.read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise CorruptionError(f"{checkpoint.path / _METADATA}: unreadable ({error})") from None
    weights = _weights(policy)
    _check_names(checkpoint, weights, held)
    state = dict(weights)
    moments = _blank_moments(policy, held)
    for name, fields in moments.items():
        state |= {_moment(name, field): tensor for field, tensor in fields.items()}
    state[_RNG] = torch.get_rng_state()
    _expect_one_process()
    with torch.no_grad():
        load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    torch.set_rng_state(state[_RNG])
    optimizer.state.clear()
    for name, parameter in policy.model.named_parameters():
        if name in moments:
            fields = moments[name]
            if optimizer.defaults.get("fused"):  # which counts steps where the parameter is
                fields = {field: tensor.to(parameter.device) for field, tensor in fields.items()}
            optimizer.state[parameter] = dict(fields)


def _check_names(checkpoint: Checkpoint, weights: State, held: dict[str, Any]) -> None:
    saved = {name for name in held if name.startswith("model.")}
    for name in sorted(weights.keys() ^ saved):
        what = "lacks" if name in weights else "has"
        raise CorruptionError(f"{checkpoint.path}: {what} {name}, unlike the policy that it is loaded into")
    for name, tensor in weights.items():
        if tuple(held[name].size) != tuple(tensor.shape):
            raise CorruptionError(
                f"{checkpoint.path}: {name} has shape {tuple(held[name].size)}, the policy's {tuple(tensor.shape)}"
            )


def _blank_moments(policy: Policy, held: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Room for the optimizer's state of each parameter that has one, laid out as the parameter is."""
    parameters = dict(policy.model.named_parameters())
    out: dict[str, dict[str, Tensor]] = {}
    for key, entry in held.items():
        kind, _, rest = key.partition(".")
        field, _, name = rest.partition(".")
        if kind != "optimizer" or name not in parameters:
            continue
        parameter, dtype = parameters[name].detach(), entry.properties.dtype
        like = tuple(entry.size) == tuple(parameter.shape)
        blank = torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(entry.size, dtype=dtype)
        out.setdefault(name, {})[field] = blank
    return out


# -- both ----------------------------------------------------------------------------------------------------------


def _weights(policy: Policy) -> State:
    """What trains, sharing the model's memory."""
    return {f"model.{name}": tensor for name, tensor in trained_state(policy.model).items()}


def _optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> State:
    return {
        _moment(name, field): value
        for name, parameter in policy.model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def _moment(name: str, field: str) -> str:
    return f"optimizer.{field}.{name}"


def _expect_one_process() -> None:
    # One process without a process group is no accident here.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def step_folders(root: Path) -> list[Path]:
    """The folders of the checkpoints below root, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdecimal())


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is called by."""
    return int(folder.name[5:])


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total = google_crc32c.extend(total, block)
    return total
