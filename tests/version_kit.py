"""Versions of a model as an engine gets them: what the trainer's side makes, without a link between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mgrpo.weights.history import History
from mgrpo.weights.version import Part, Spool, Weights


class Versions:
    """What a trainer has published, version 1 first."""

    def __init__(self, dtype: torch.dtype | None, role: str) -> None:
        self._history, self._role, self._newest = History(dtype), role, 0

    def label(self, version: int) -> str:
        return f"{self._role}.e1.v{version}"

    def put(self, state: Mapping[str, Tensor]) -> int:
        """The next version; its number."""
        self._newest += 1
        self._history.put(self.label(self._newest), state.items(), lambda label: True)
        return self._newest

    def whole(self) -> Weights:
        """The newest version as a whole."""
        label, layout = self.label(self._newest), self._history.layout
        assert layout is not None
        data = self._history.read(label, 0, len(layout.header) + layout.size)
        assert data is not None
        return Weights(
            label, self._newest, layout, (Part("", label, _spool(data), self._history.sums(label)),)
        )

    def since(self, version: int) -> Weights:
        """The patches from a version to the newest."""
        label, layout = self.label(self._newest), self._history.layout
        patches = self._history.patches(self.label(version), label)
        assert layout is not None and patches
        parts = []
        for patch in patches:
            assert patch.data is not None
            parts.append(Part(patch.base, patch.label, _spool(patch.data.tobytes())))
        return Weights(label, self._newest, layout, tuple(parts))

    def close(self) -> None:
        self._history.close()


@contextmanager
def versions(dtype: torch.dtype | None = None, role: str = "main") -> Iterator[Versions]:
    """Their threads are gone when the block ends."""
    made = Versions(dtype, role)
    try:
        yield made
    finally:
        made.close()


def _spool(data: bytes) -> Spool:
    spool = Spool(len(data))
    spool.write(0, data)
    return spool


def moved(state: Mapping[str, Tensor], seed: int, share: float = 0.03) -> dict[str, Tensor]:
    """New weights of which `share` have changed, a little; what is no number stays."""
    noise = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in state.items():
        out[name] = tensor.detach().clone()
        if tensor.is_floating_point():
            mask = torch.rand(tensor.shape, generator=noise) < share
            step = torch.randn(tensor.shape, generator=noise) * 0.05
            out[name] = torch.where(mask, tensor + step.to(tensor.dtype), tensor).detach()
    return out
