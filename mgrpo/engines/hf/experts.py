"""Which experts the tokens in the slot cache were sent to when they were fed, for routing replay."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mgrpo.errors import ConfigError
from mgrpo.model.groups import Int64
from mgrpo.model.policy import Policy
from mgrpo.model.routing_replay import listen
from mgrpo.types import Experts


class SlotExperts:
    """An array over slots and columns, as wide as the longest history so far: k bytes a token and router."""

    def __init__(self, policy: Policy, slots: int) -> None:
        """Raises ConfigError for a dense policy."""
        routers = policy.routing.routers
        if not routers:
            raise ConfigError(
                f"{policy.name}: policy.routing_replay=true needs a mixture of experts whose routers transformers "
                f"records; {type(policy.model).__name__} has none"
            )
        self._slots, self._routers = slots, len(routers)
        self._count = 0  # E
        self._last: dict[int, Tensor] = {}  # router -> choice of the last forward
        self._kept: Experts | None = None  # (slots, columns, N, k)
        listen(routers, self._note)

    def _note(self, router: int, found: tuple[Tensor, Tensor]) -> None:
        """The logits, E numbers a token and router, go: they would stay on the device until the next forward."""
        logits, self._last[router] = found
        self._count = logits.shape[-1]

    def keep(self, rows: Int64, start: Int64, counts: Int64) -> None:
        """After a forward that fed counts[i] tokens of slot rows[i] behind start[i] others."""
        choice = torch.stack([self._last.pop(router) for router in range(self._routers)], 1).cpu().numpy()
        width = len(choice) // len(rows)
        choice = choice.reshape(len(rows), width, *choice.shape[1:])
        kept = self._wide(int((start + counts).max()), choice.shape[-1])
        inside = np.arange(width) < counts[:, None]
        columns = start[:, None] + np.arange(width)
        kept[np.broadcast_to(rows[:, None], inside.shape)[inside], columns[inside]] = choice[inside]

    def of(self, slot: int, tokens: int) -> Experts:
        """(tokens, N, k) of the first ones of a slot's history."""
        assert self._kept is not None
        return self._kept[slot, :tokens].copy()

    def _wide(self, columns: int, chosen: int) -> Experts:
        held = 0 if self._kept is None else self._kept.shape[1]
        if self._kept is not None and held >= columns:
            return self._kept
        shape = (self._slots, max(columns, 2 * held), self._routers, chosen)
        wider: Experts = (
            np.zeros(shape, np.uint8) if self._count <= np.iinfo(np.uint8).max else np.zeros(shape, np.uint16)
        )
        if self._kept is not None:
            wider[:, :held] = self._kept
        self._kept = wider
        return wider
