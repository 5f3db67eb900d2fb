"""Which rows of a head are tokens. Heads are often padded to a round number of rows; the spare ids mean nothing to the
tokenizer, so they are neither sampled nor part of any distribution that is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo.errors import ConfigError


class Vocabulary:
    """The tokens of a head: ids as the tokenizer has them, classes as the loss numbers the head's rows that are left.
    Both are the same unless the tokenizer leaves ids out before its last one."""

    def __init__(self, tokenizer: Any, rows: int, name: str) -> None:
        """rows: of the head. name: how errors call the policy. Raises ConfigError where the tokenizer has a token that
        the head has no row for."""
        ids = sorted({int(i) for i in tokenizer.get_vocab().values()})
        if not ids or ids[0] < 0:
            raise ConfigError(f"{name}: the tokenizer has no tokens with ids from 0")
        if ids[-1] >= rows:
            raise ConfigError(
                f"{name}: the tokenizer has {len(ids)} tokens up to id {ids[-1]}, the model's head {rows} rows"
            )
        self.rows, self.size, self.end = rows, len(ids), ids[-1] + 1
        self._ids = None if self.size == self.end else torch.tensor(ids)

    def unnamed(self) -> list[int]:
        """The ids of the head's rows that are no token."""
        if self._ids is None:
            return list(range(self.size, self.rows))
        return sorted(set(range(self.rows)) - set(self._ids.tolist()))

    def head(self, weight: Tensor) -> Tensor:
        """The rows (N, H) of the head weight (V, H) that are tokens: a view, or a copy where ids are left out."""
        if self._ids is not None:
            return weight.index_select(0, self._ids.to(weight.device))
        return weight if self.size == self.rows else weight[: self.size]

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden @ head(weight).T without a copy of the weight, in the weight's dtype."""
        found = hidden.to(weight.dtype) @ weight[: self.end].T
        return found if self._ids is None else found.index_select(-1, self._ids.to(found.device))

    def classes(self, ids: Tensor) -> Tensor:
        """Token ids i64 as rows of head(weight). Raises ValueError for an id that is no token (on the CPU)."""
        if ids.device.type == "cpu" and ids.numel():
            known = ids < self.end if self._ids is None else torch.isin(ids, self._ids)
            if not bool(known.all()):
                raise ValueError(
                    f"token id {int(ids[~known][0])} is none of the tokenizer's {self.size} tokens"
                )
        return ids if self._ids is None else torch.searchsorted(self._ids.to(ids.device), ids)

    def tokens(self, classes: Tensor) -> Tensor:
        """The inverse of `classes`."""
        return classes if self._ids is None else self._ids.to(classes.device)[classes]
