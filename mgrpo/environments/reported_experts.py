"""Which experts a segment's tokens were sent to, put together from what the engine reports with each turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mgrpo.errors import InfrastructureError
from mgrpo.types import Experts


def merged(held: Experts | None, reported: Experts, tokens: int, name: str) -> Experts:
    """What is known of the first tokens of a segment, after a turn's report (m, N, k) of its first m. What was known
    stays: an engine that computed a history anew may have sent it elsewhere, and what was sampled saw the first.
    tokens: of the segment. Raises InfrastructureError for a report that does not fit."""
    shape, dtype = reported.shape, reported.dtype
    if reported.ndim != 3 or dtype not in (np.uint8, np.uint16) or len(reported) > tokens:
        raise InfrastructureError(
            f"{name}: the engine reports experts {dtype}{shape} of {tokens} tokens, expected u8 or u16 (tokens, N, k)"
        )
    if held is None:
        return reported
    if (held.shape[1:], held.dtype) != (shape[1:], dtype):
        raise InfrastructureError(
            f"{name}: the engine reports experts {dtype}{shape}, {held.dtype}{held.shape} in an earlier turn"
        )
    n = min(len(held), len(reported))
    unknown = held[:n] == np.iinfo(dtype).max
    return np.concatenate([np.where(unknown, reported[:n], held[:n]), held[n:], reported[n:]])


def joined(parts: Sequence[Experts | None], lengths: Sequence[int], name: str) -> Experts | None:
    """Those of segments with `lengths` tokens, one after the other (L, N, k): not known behind what was reported of
    each. None where nothing was of any. Raises InfrastructureError where they differ in N, k or dtype."""
    shapes = {(part.shape[1:], part.dtype) for part in parts if part is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        kinds = ", ".join(sorted(f"{dtype}{shape}" for shape, dtype in shapes))
        raise InfrastructureError(f"{name}: the engine reports experts of a token as {kinds}, expected one")
    ((shape, dtype),) = shapes
    out = np.full((sum(lengths), *shape), np.iinfo(dtype).max, dtype)
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        if part is not None:
            out[start : start + len(part)] = part
        start += length
    return out
