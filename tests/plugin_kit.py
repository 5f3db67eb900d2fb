"""The plug-in without vLLM: a model double whose loader cuts and fuses as vLLM's do, and versions for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from mgrpo.engines.vllm.plugin.in_place import InPlace
from mgrpo.engines.vllm.plugin.loading import WeightLoading
from mgrpo.types import Probe
from mgrpo.weights.layout import Layout
from mgrpo.weights.patch import Patch, bytes_of, difference
from mgrpo.weights.version import Part, Spool, Weights

VOCAB, WIDTH = 12, 8
SHAPES = {
    "embed.weight": (VOCAB, WIDTH),
    "k.weight": (4, WIDTH),
    "norm.weight": (WIDTH,),
    "o.weight": (WIDTH, WIDTH),
    "q.weight": (WIDTH, WIDTH),
    "scale": (),
}
"""Checkpoint names; q and k are one parameter of the double, and o is cut along its columns."""


class Double(nn.Module):
    """One tensor-parallel rank of a model."""

    def __init__(self, rank: int = 0, ranks: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        shapes = {
            "embed": (VOCAB // ranks, WIDTH),
            "qk": ((WIDTH + 4) // ranks, WIDTH),
            "norm": (WIDTH,),
            "o": (WIDTH, WIDTH // ranks),
            "scale": (),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        taken = set()
        for name, tensor in weights:
            self._load(name.removesuffix(".weight"), tensor)
            taken.add(name)
        return taken

    def _load(self, name: str, tensor: Tensor) -> None:
        place = getattr(self, "qk" if name in "qk" else name).data
        if name in ("q", "k"):
            split = WIDTH // self.ranks
            place = place[:split] if name == "q" else place[split:]
        axis = 1 if name == "o" else 0
        if name in ("q", "k", "o", "embed"):
            size = tensor.shape[axis] // self.ranks
            tensor = tensor.narrow(axis, self.rank * size, size)
        assert place.shape == tensor.shape, f"{name}: {tuple(tensor.shape)} into {tuple(place.shape)}"
        place.copy_(tensor)

    def whole(self) -> dict[str, Tensor]:
        """Checkpoint tensors, of a model on one rank."""
        found = {
            "embed.weight": self.embed,
            "norm.weight": self.norm,
            "o.weight": self.o,
            "scale": self.scale,
        }
        return found | {"q.weight": self.qk[:WIDTH], "k.weight": self.qk[WIDTH:]}


@contextlib.contextmanager
def plainly(model: Any, vllm_config: Any) -> Iterator[Any]:
    yield model.load_weights


class Worker(WeightLoading):
    """vLLM's worker with the plug-in mixed in."""

    _mgrpo_reloading = staticmethod(plainly)  # type: ignore[assignment]

    @staticmethod
    def _mgrpo_apply(patch: InPlace, model: Any, vllm_config: Any, changes: Any) -> None:
        patch.apply(changes)

    def __init__(self, model: Double | None = None) -> None:
        self.model = model or Double()
        parallel = SimpleNamespace(tensor_parallel_size=self.model.ranks, pipeline_parallel_size=1)
        self.vllm_config = SimpleNamespace(quant_config=None, parallel_config=parallel)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)

    def bytes_held(self) -> bytes:
        """The version as a safetensors file, read out of the model."""
        layout = self.mgrpo_held.layout
        assert layout is not None
        held = self.model.whole()
        return layout.header + b"".join(raw(held[info.name]) for info in layout.tensors)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of a version."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}


def moved(before: dict[str, Tensor], seed: int, share: float = 0.1) -> dict[str, Tensor]:
    """A step: some weights of each tensor move."""
    random = torch.Generator().manual_seed(seed)
    after = {}
    for name, tensor in before.items():
        step = torch.randn(tensor.shape, generator=random) * (
            torch.rand(tensor.shape, generator=random) < share
        )
        after[name] = (tensor + step.to(tensor.dtype)).to(tensor.dtype)
    return after


def whole(label: str, version: int, tensors: dict[str, Tensor], probe: Probe | None = None) -> Weights:
    return Weights.of_bytes(label, version, safetensors.torch.save(tensors), probe)


def patch(
    base: str,
    before: dict[str, Tensor],
    label: str,
    version: int,
    after: dict[str, Tensor],
    probe: Probe | None = None,
) -> Weights:
    """What changed, as it arrives over the link."""
    files = [bytes_of(safetensors.torch.save(one)) for one in (before, after)]
    layout = Layout.parse(files[0].tobytes())
    begin = len(layout.header)
    made = Patch(base, label, {})
    for piece in layout.slices:
        old, new = (np.array(f[begin + piece.offset : begin + piece.offset + piece.nbytes]) for f in files)
        if change := difference(piece, layout.tensors[piece.tensor].itemsize, old, new):
            made.changes[piece.index] = change
    made.pack()
    assert made.data is not None
    spool = spool_of(made.data.tobytes())
    return Weights(label, version, layout, (Part(base, label, spool),), probe)


def spool_of(data: bytes) -> Spool:
    spool = Spool(len(data))
    spool.write(0, data)
    return spool
