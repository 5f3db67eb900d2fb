"""The folder through which servers get new weights: one subfolder a version, and a lock for each server.

    main.e1.v7/model.safetensors        the version, whole; model.safetensors.sums: crc32c of each slice
    main.e1.v7/main.e1.v6-<n>-<crc>.patch   what changed since another version: n bytes with this crc32c
    main.e1.v7/probe.json               what the trainer says of the probe's prompt (types.Probe)
    <server>.right                      versions that this server was found to serve, or is about to be given

Files appear complete, by a rename. A version that came as a patch is made whole where somebody needs it, from the
nearest whole before it: a copy on disk, in which patches change slice after slice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
from filelock import AsyncFileLock, Timeout

from mgrpo.config.policy import LoraConfig
from mgrpo.engines.labels import Label, parse_label
from mgrpo.errors import CorruptionError, DeadlineError
from mgrpo.types import Probe
from mgrpo.weights.layout import Layout
from mgrpo.weights.patch import bytes_of, checksum, parse_changes
from mgrpo.weights.version import Weights

KEEP = 3  # versions on disk, and adapters in a server: a slower worker may still be at the one before
REBASE = 8  # patches on the nearest whole, after which a version is made whole
NOTES = 1000  # lines about a server that are kept
WHOLE = "model.safetensors"
SUMS = WHOLE + ".sums"
PATCH = ".patch"


@dataclass(frozen=True, slots=True)
class PatchFile:
    """From version `base` to version `label`: what the file must be."""

    base: str
    label: str
    path: Path
    size: int
    crc: int

    @classmethod
    def of(cls, label: str, path: Path) -> PatchFile:
        base, size, crc = path.name.removesuffix(PATCH).rsplit("-", 2)
        return cls(base, label, path, int(size), int(crc, 16))


class WeightFolder:
    """Shared with the servers and with the other workers."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, label: Label) -> Path:
        """Where a version lies."""
        return self.root / str(label)

    def whole(self, label: Label) -> Path:
        """Its file, once it is whole there."""
        return self.path(label) / WHOLE

    # -- what arrives ----------------------------------------------------------------------------------------------

    def add(self, weights: Weights) -> None:
        """Keep what came: a whole, or patches. Idempotent. Raises CorruptionError where that is not what the trainer
        sent, or changes a version that is not here."""
        label = _label(weights.label)
        if weights.is_whole:
            if not self.whole(label).exists():
                self._add_whole(label, weights)
        else:
            for part in weights.parts:
                name = f"{part.base}-{part.spool.size}-{part.spool.checksum():08x}{PATCH}"
                with _fresh(self.path(_label(part.label)) / name) as (path,):
                    part.spool.copy_to(path)
            if self._chain(label, self._is_whole) is None:
                raise CorruptionError(
                    f"{weights.label}: it changes {weights.base}, which is not in {self.root}"
                )
        self.clean()

    def _add_whole(self, label: Label, weights: Weights) -> None:
        announced = weights.parts[0].sums
        sums = np.zeros(len(weights.layout.slices), "<u4")
        folder = self.path(label)
        with _fresh(folder / SUMS, folder / WHOLE) as (sums_file, file):
            with file.open("wb") as out:
                out.write(weights.layout.header)
                for piece, data in weights.slices():
                    sums[piece.index] = checksum(data)
                    if announced is not None and sums[piece.index] != announced[piece.index]:
                        name = weights.layout.tensors[piece.tensor].name
                        raise CorruptionError(
                            f"{weights.label}: {name} arrived damaged (bytes {piece.start}..{piece.stop})"
                        )
                    out.write(data.data)
            sums_file.write_bytes(sums.tobytes())

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
        self.clean()

    # -- from one version to another -------------------------------------------------------------------------------

    def patches(self, base: str, label: Label) -> list[PatchFile] | None:
        """Those that lead from version `base` to `label`, in order; None where some are missing."""
        return self._chain(label, lambda found: found == base)

    def _is_whole(self, label: str) -> bool:
        return (self.root / label / WHOLE).exists()

    def _chain(self, label: Label, ends: Callable[[str], bool]) -> list[PatchFile] | None:
        """The fewest patches that lead to `label` from a version for which `ends` holds."""
        seen, front = {str(label)}, [(str(label), list[PatchFile]())]
        while front:
            ahead = []
            for found, chain in front:
                if ends(found):
                    return chain
                for path in sorted((self.root / found).glob("*" + PATCH)):
                    patch = PatchFile.of(found, path)
                    if patch.base not in seen:
                        seen.add(patch.base)
                        ahead.append((patch.base, [patch, *chain]))
            front = ahead
        return None

    def patched(self, label: Label) -> int:
        """Patches between a version and the nearest whole before it."""
        return len(self._chain(label, self._is_whole) or ())

    def make_whole(self, label: Label) -> Path:
        """The version's file, made of the nearest whole and patches where it is not there. Raises CorruptionError
        where that cannot be, or its bytes are not the trainer's."""
        if self.whole(label).exists():
            return self.whole(label)
        chain = self._chain(label, self._is_whole)
        if not chain:
            raise CorruptionError(f"{label}: no whole version in {self.root} leads to it")
        source, folder = self.root / chain[0].base / WHOLE, self.path(label)
        try:
            with _fresh(folder / SUMS, folder / WHOLE) as (sums_file, file):
                shutil.copyfile(source, file)
                sums = np.fromfile(source.with_name(SUMS), "<u4")
                with file.open("r+b") as out:
                    layout = _layout_of(out.fileno())
                    for patch in chain:
                        _change(out.fileno(), layout, sums, patch)
                sums_file.write_bytes(sums.tobytes())
        except FileNotFoundError as error:  # a faster worker has removed what is old to it
            raise CorruptionError(f"{label}: {error.filename} is gone") from None
        except ValueError as error:  # the header of the nearest whole
            raise CorruptionError(f"{source}: {error}") from None
        return self.whole(label)

    def drop_damaged(self, label: Label) -> bool:
        """After a server has refused a version: remove its file if that is not what was written."""
        file = self.whole(label)
        try:
            intact = _is_intact(file)
        except FileNotFoundError:
            return True
        if not intact:
            file.unlink(missing_ok=True)
        return not intact

    # -- what is known of it ---------------------------------------------------------------------------------------

    def write_probe(self, label: Label, probe: Probe) -> None:
        """Also for workers that never pull this version, but meet it in an answer."""
        path = self.path(label) / "probe.json"
        if not path.exists():
            with _fresh(path) as (fresh,):
                fresh.write_bytes(msgspec.json.encode(probe))
            self.clean()

    def probe(self, label: Label) -> Probe | None:
        try:
            return msgspec.json.decode((self.path(label) / "probe.json").read_bytes(), type=Probe)
        except FileNotFoundError:
            return None

    def note(self, label: Label, url: str, *, right: bool) -> None:
        """The server was found to serve this version, or may not any more. Under the server's lock."""
        path, lines = self._notes(url)
        with _fresh(path) as (fresh,):
            fresh.write_text("\n".join([*lines[-NOTES:], f"{'+' if right else '-'}{label}"]))

    def is_right(self, label: Label, url: str) -> bool:
        """Whether some worker has found the server to serve this version."""
        _, lines = self._notes(url)
        return next((line[0] == "+" for line in reversed(lines) if line[1:] == str(label)), False)

    def _notes(self, url: str) -> tuple[Path, list[str]]:
        path = self.root / f"{_name_of(url)}.right"
        try:
            return path, path.read_text().splitlines()
        except FileNotFoundError:
            return path, []

    def clean(self) -> None:
        """Remove all but the newest versions and what they are made of, and what a killed worker left unfinished of
        older ones."""
        versions = sorted((label, p) for p in self.root.iterdir() if (label := parse_label(p.name)))
        if not versions:
            return
        oldest = versions[-KEEP:][0][0]
        if chain := self._chain(versions[-1][0], self._is_whole):
            oldest = min(oldest, *(_label(patch.base) for patch in chain))
        for label, old in versions:
            if label < oldest:
                shutil.rmtree(old, ignore_errors=True)
        for unfinished in self.root.glob(".*"):
            found = parse_label(unfinished.stem.removeprefix("."))
            if found is not None and found < oldest:
                shutil.rmtree(unfinished, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def lock(self, url: str, seconds: float) -> AsyncIterator[None]:
        """Held by one worker at a time for the server at `url`. Raises DeadlineError after `seconds`."""
        self.root.mkdir(parents=True, exist_ok=True)
        # Never by the file's existence: a killed worker would leave it. Attempts do not block, so no thread for them.
        lock = AsyncFileLock(
            self.root / f"{_name_of(url)}.lock",
            timeout=seconds,
            fallback_to_soft=False,
            run_in_executor=False,
        )
        try:
            await lock.acquire()
        except Timeout:
            raise DeadlineError(f"{url}: another worker has been updating it for {seconds:g} s") from None
        try:
            yield
        finally:
            await lock.release()


def _name_of(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:12]


def _label(text: str) -> Label:
    label = parse_label(text)
    if label is None:
        raise CorruptionError(f"{text!r} is no label of a version")
    return label


@contextlib.contextmanager
def _fresh(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Paths beside the targets to write to, which take the targets' place in their order, or are removed."""
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    fresh = tuple(target.with_name(f".{target.name}.{uuid.uuid4().hex}") for target in targets)
    try:
        yield fresh
        for path, target in zip(fresh, targets, strict=True):
            path.replace(target)
    finally:
        for path in fresh:
            path.unlink(missing_ok=True)


def _is_intact(file: Path) -> bool:
    sums = np.fromfile(file.with_name(SUMS), "<u4")
    with file.open("rb") as opened:
        number = opened.fileno()
        try:
            layout = _layout_of(number)
        except ValueError:
            return False
        begin = len(layout.header)
        return len(sums) == len(layout.slices) and all(
            checksum(bytes_of(os.pread(number, piece.nbytes, begin + piece.offset))) == sums[piece.index]
            for piece in layout.slices
        )


def _layout_of(number: int) -> Layout:
    return Layout.read(lambda at, size: os.pread(number, size, at), os.fstat(number).st_size)


def _change(
    number: int, layout: Layout, sums: np.ndarray[tuple[int], np.dtype[np.uint32]], patch: PatchFile
) -> None:
    """Apply a patch to a whole's file, slice by slice."""
    with patch.path.open("rb") as opened:
        source = opened.fileno()
        size = os.fstat(source).st_size
        begin = len(layout.header)
        for change in parse_changes(lambda at, n: bytes_of(os.pread(source, n, at)), size, layout):
            piece = change.slice
            data = bytearray(os.pread(number, piece.nbytes, begin + piece.offset))
            change.apply(data)
            if not change.check(data):
                name = layout.tensors[piece.tensor].name
                raise CorruptionError(
                    f"{patch.path}: after the patch the bytes of {name} are not the trainer's"
                )
            os.pwrite(number, data, begin + piece.offset)
            sums[piece.index] = change.crc


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
