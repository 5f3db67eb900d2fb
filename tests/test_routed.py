"""Experts of tokens as servers report them: what is read, and what is refused by name."""

from __future__ import annotations

import base64
import pickle
from typing import Any

import numpy as np
import pytest

from mgrpo.engines.client import Completion
from mgrpo.engines.routed import experts_of, from_int32, from_npy
from mgrpo.errors import InfrastructureError
from mgrpo.model.routers import Routing
from tests.fake_vllm import npy

ROUTING = Routing(layers=3, places=(0, 2), experts=9, chosen=4)


def reported(tokens: int, routing: Routing = ROUTING, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What a server says: different experts in layers with a router, zeros elsewhere."""
    random = np.random.default_rng(seed)
    raw = np.zeros((tokens, routing.layers, routing.chosen), np.int64)
    for token in range(tokens):
        for layer in routing.places:
            raw[token, layer] = random.permutation(routing.experts)[: routing.chosen]
    return raw


@pytest.mark.parametrize(
    ("experts", "dtype"), [(9, np.uint8), (255, np.uint8), (256, np.uint16), (300, np.uint16)]
)
def test_what_is_reported_is_what_is_read(experts: int, dtype: type[np.generic]) -> None:
    """In either form, in any integer type and order of axes in memory; 255 stays free for what is not known."""
    routing = Routing(3, (0, 2), experts, 4)
    for tokens in (0, 1, 17):
        raw = reported(tokens, routing, experts)
        sent = [np.uint16, np.int32, np.int64, *([np.uint8] if experts <= 256 else [])]
        read = [from_npy(npy(raw.astype(kind)), "s") for kind in sent]
        read.append(from_npy(npy(np.asfortranarray(raw.astype(np.int16))), "s"))
        read.append(from_int32(base64.b64encode(raw.astype("<i4").tobytes()).decode(), routing, "s"))
        for array in read:
            found = experts_of(array, routing, tokens, "s")
            assert found.dtype == dtype and np.array_equal(found, raw[:, [0, 2]])


def test_numpy_files_that_are_none() -> None:
    """Nothing in them is run, and no header makes us allocate what is not there."""
    good = base64.b64decode(npy(reported(5).astype(np.uint8)))
    grown = good.replace(b"(5, 3, 4)", b"(9000000000, 3, 4)")
    for data, what in (
        (b"", "no numpy file"),
        (b"{}", "no numpy file"),
        (good[:40], "no numpy file"),
        (good[:-1], r"59 bytes of routed experts of shape \(5, 3, 4\)"),
        (good + b"x", r"61 bytes of routed experts of shape \(5, 3, 4\)"),
        (grown, "no numpy file|bytes of routed experts of shape"),
        (good.replace(b"\x93NUMPY\x01", b"\x93NUMPY\x02"), "not of version 1.0"),
        (pickle.dumps({"a": 1}), "no numpy file"),
        (good.replace(b"(5, 3, 4)", b"((5, 3, 4"), "no numpy file"),
        (good.replace(b"{'descr", b"  x\n y "), "no numpy file"),
        (good.replace(b"(5, 3, 4)", b"(-5,-3,4)"), r"of shape \(-5, -3, 4\)"),
    ):
        with pytest.raises(InfrastructureError, match=f"^http://s: .*({what})"):
            from_npy(base64.b64encode(data).decode(), "http://s")
    with pytest.raises(InfrastructureError, match="no base64"):
        from_npy("###", "http://s")
    for array in (reported(5).astype(np.float32), reported(5)[0], np.asarray([[[{}]]], object)):
        with pytest.raises(InfrastructureError, match=r"expected integers \(tokens, layers, k\)"):
            from_npy(npy(array), "http://s")


def test_int32_of_another_shape() -> None:
    text = base64.b64encode(bytes(4 * 12 * 5 + 4)).decode()
    with pytest.raises(
        InfrastructureError, match="s: 244 bytes of routed experts; expected a multiple of 48"
    ):
        from_int32(text, ROUTING, "s")


def test_experts_of_another_model() -> None:
    """Shape, bounds, and where the routers are."""
    raw = reported(6)
    for change, what in (
        (lambda a: a[:5], r"shape \(5, 3, 4\); expected \(6, 3, 4\): tokens, layers"),
        (lambda a: a[:, :2], r"shape \(6, 2, 4\)"),
        (lambda a: a[:, :, :3], r"shape \(6, 3, 3\)"),
        (lambda a: np.where(a == 8, 9, a), r"routed experts 0\.\.9; the model has 0\.\.8"),
        (lambda a: np.where(a == 8, -1, a), r"routed experts -1\.\.7; the model has"),
        (lambda a: a[:, [1, 0, 2]], "in layer 1, which has no router by the policy's config.json"),
        (lambda a: a * [[[1], [1], [0]]], "token 0 went to expert 0 twice in layer 2, which has a router"),
    ):
        with pytest.raises(InfrastructureError, match=f"^s: .*{what}"):
            experts_of(change(raw.copy()), ROUTING, 6, "s")


@pytest.mark.parametrize("known", [0, 2, 7])
def test_a_cut_completion_keeps_the_experts_of_what_is_left(known: int) -> None:
    """Of 7 tokens of prompt and 5 sampled ones, of which the last was no input, also where those of some are known."""
    experts = experts_of(reported(11), ROUTING, 11, "s")
    whole = Completion([1, 2, 3, 4, 5], [-1.0] * 5, [], "length", experts[known:])
    for n in (1, 3, 5):
        cut = whole.cut(n).experts
        assert cut is not None and np.array_equal(cut, experts[known : 7 + n - 1])
    assert Completion([1, 2], [-1.0] * 2, [], "length").cut(1).experts is None
