"""Versions of a model that moves in this process, as they arrive over the link."""

from __future__ import annotations

import numpy as np
import safetensors.torch
import torch

from mgrpo.model.policy import Policy, state_of
from mgrpo.model.probe import probe, probe_ids
from mgrpo.types import version_label
from mgrpo.weights.patch import Bytes, Patch, difference
from mgrpo.weights.version import Part, Spool, Weights


class Steps:
    """`whole` is the version that the policy is at; `patch` moves it one version on."""

    def __init__(self, policy: Policy, version: int = 0) -> None:
        self.policy, self.version = policy, version
        self._probe = probe_ids(policy, 64)
        first = self.whole()
        self.layout = first.layout
        state = state_of(policy.model)
        self.state = {info.name: state[info.name] for info in self.layout.tensors}

    @property
    def label(self) -> str:
        return version_label("main", 1, self.version)

    def whole(self) -> Weights:
        data = safetensors.torch.save({k: v.contiguous() for k, v in state_of(self.policy.model).items()})
        return Weights.of_bytes(self.label, self.version, data, probe(self.policy, self._probe))

    def patch(self, share: float = 0.01, scale: float = 0.1) -> Weights:
        """Some weights of every tensor move by a part of themselves."""
        base = self.label
        self.version += 1
        made = Patch(base, self.label, {})
        random = torch.Generator().manual_seed(self.version)
        for number, info in enumerate(self.layout.tensors):
            tensor = self.state[info.name]
            before = bytes_of(tensor).copy()
            flat = tensor.view(-1)
            places = torch.randint(flat.numel(), (max(1, int(share * flat.numel())),), generator=random)
            flat[places] *= 1.0 + scale * torch.randn(len(places), generator=random).to(flat.dtype)
            after = bytes_of(tensor)
            for piece in (p for p in self.layout.slices if p.tensor == number):
                cut = slice(piece.start, piece.stop)
                if change := difference(piece, info.itemsize, before[cut], after[cut]):
                    made.changes[piece.index] = change
        made.pack()
        assert made.data is not None
        spool = Spool(len(made.data))
        spool.write(0, made.data.tobytes())
        said = probe(self.policy, self._probe)
        return Weights(self.label, self.version, self.layout, (Part(base, self.label, spool),), said)


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """A view."""
    return np.asarray(tensor.detach().view(-1).view(torch.uint8).numpy())
