"""Experts of each token, as servers report them: from their bytes to mgrpo.types.Experts.

A server reports (tokens, decoder layers, k), zeros for a layer without a router, of all tokens of prompt and completion
but the last one, which was no input. What it says is checked before a trainer forces it on its routers: numbers within
those of the model, as many experts as it chooses, and routers where the policy's config.json has them: the k experts of
a token differ, so a layer of zeros cannot be one's (of k = 1, any layer could).
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import tokenize
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from mgrpo.errors import InfrastructureError
from mgrpo.model.routers import Routing
from mgrpo.types import Experts

INTEGERS = ("u1", "u2", "i2", "i4", "i8")
"""Types that numbers of experts arrive in, without their byte order."""


def from_npy(text: str, where: str) -> npt.NDArray[np.generic]:
    """The array of a base64 text of numpy's file format, as vLLM sends it. Raises InfrastructureError naming `where`:
    for what is no file of integers of three dimensions, too. Its header is read and nothing of it is ever run."""
    data = io.BytesIO(_bytes(text, where))
    try:
        if np.lib.format.read_magic(data) != (1, 0):
            raise ValueError("not of version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(data)
    except (
        ValueError,
        EOFError,
        TypeError,
        SyntaxError,
        tokenize.TokenError,
    ) as error:  # as numpy lets them out
        raise InfrastructureError(f"{where}: routed experts that are no numpy file: {error!s:.80}") from None
    body = data.read()
    sizes = len(shape) == 3 and all(type(n) is int and n >= 0 for n in shape)
    if not sizes or dtype.str[1:] not in INTEGERS or len(body) != math.prod(shape) * dtype.itemsize:
        raise InfrastructureError(
            f"{where}: {len(body)} bytes of routed experts of shape {shape} and type {dtype}; expected integers "
            "(tokens, layers, k)"
        )
    array: npt.NDArray[np.generic] = np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
    return array


def from_int32(text: str, routing: Routing, where: str) -> npt.NDArray[np.generic]:
    """(tokens, layers, k) of a base64 text of little-endian int32, as SGLang sends it. Raises InfrastructureError
    naming `where`."""
    data, row = _bytes(text, where), 4 * routing.layers * routing.chosen
    if len(data) % row:
        raise InfrastructureError(
            f"{where}: {len(data)} bytes of routed experts; expected a multiple of {row}, 4 for each of "
            f"{routing.layers} layers x {routing.chosen} experts of a token"
        )
    return np.frombuffer(data, "<i4").reshape(-1, routing.layers, routing.chosen)


def experts_of(raw: npt.NDArray[np.generic], routing: Routing, tokens: int, where: str) -> Experts:
    """(tokens, N, k) of the routers from what a server reports, (tokens, layers, k): uint8 where the model has at most
    255 experts, else uint16. Raises InfrastructureError naming `where` and what does not fit."""
    expected = (tokens, routing.layers, routing.chosen)
    if raw.shape != expected:
        raise InfrastructureError(
            f"{where}: routed experts of shape {raw.shape}; expected {expected}: tokens, layers, experts of a token"
        )
    if raw.size and not 0 <= int(raw.min()) <= int(raw.max()) < routing.experts:
        raise InfrastructureError(
            f"{where}: routed experts {int(raw.min())}..{int(raw.max())}; the model has 0..{routing.experts - 1}"
        )
    places = list(routing.places)
    dense = sorted({*range(routing.layers)} - {*places})
    if raw[:, dense].any():
        layer = next(layer for layer in dense if raw[:, layer].any())
        raise InfrastructureError(
            f"{where}: routed experts in layer {layer}, which has no router by the policy's config.json"
        )
    chosen = raw[:, places]
    if routing.chosen > 1 and (chosen[..., 0] == chosen[..., 1]).any():
        token, router = np.argwhere(chosen[..., 0] == chosen[..., 1])[0]
        raise InfrastructureError(
            f"{where}: token {token} went to expert {chosen[token, router, 0]} twice in layer {places[router]}, which "
            "has a router by the policy's config.json"
        )
    # The smallest type that has a number left for experts that are not known.
    return chosen.astype(np.uint8) if routing.experts <= 255 else chosen.astype(np.uint16)


def joined(parts: Sequence[Experts]) -> Experts:
    """Experts of one token after another, of one model."""
    return cast(Experts, np.concatenate(parts))


def _bytes(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InfrastructureError(f"{where}: routed experts that are no base64: {error}") from None
