"""Attention over a prefix tree is attention of each token to its node up to itself and to all of the node's ancestors,
in output and gradients."""

from __future__ import annotations

import itertools
import random
import sys
import types

import pytest
import torch
from torch import Tensor

from mgrpo.ops.tree_attention import Level, Saved, level, tree_attention
from mgrpo.ops.tree_kernels import CpuKernel, FlashKernel

HEADS, DIM, SCALE = 4, 8, 0.3


def random_tree(seed: int) -> tuple[list[int], list[int]]:
    """Borders of nodes in preorder (N + 1,) and their parents (N,); -1: a root. Depth to 5, branching to 8."""
    draw = random.Random(seed)
    borders, parents = [0], list[int]()

    def grow(parent: int, depth: int) -> None:
        number = len(parents)
        parents.append(parent)
        borders.append(borders[-1] + draw.randint(1, 9))
        if depth < 5 and draw.random() < 1 / depth:
            for _ in range(draw.randint(2, 8 if depth == 1 else 3)):
                grow(number, depth + 1)

    for _ in range(draw.randint(1, 3)):
        grow(-1, 1)
    return borders, parents


def levels_of(borders: list[int], parents: list[int], held: int) -> list[Level]:
    """As a caller makes them: own tokens, what is below the inner nodes of each depth, the held prefix."""
    count = len(parents)
    depth, stop = [0] * count, list(range(1, count + 1))
    for node, parent in enumerate(parents):
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    for node in reversed(range(count)):
        if parents[node] >= 0:
            stop[parents[node]] = max(stop[parents[node]], stop[node])
    found = [level([(a, b, a, b) for a, b in itertools.pairwise(borders)], causal=True)]
    for at in range(max(depth)):
        inner = [n for n in range(count) if depth[n] == at and stop[n] > n + 1]
        found.append(
            level(
                [(borders[n + 1], borders[stop[n]], borders[n], borders[n + 1]) for n in inner], causal=False
            )
        )
    if held:
        found.append(level([(0, borders[-1], 0, held)], causal=False, held=True))
    return found


def seen(borders: list[int], parents: list[int], held: int) -> Tensor:
    """bool (T, P + T): which keys each token sees, token after token."""
    tokens = borders[-1]
    mask = torch.zeros(tokens, held + tokens, dtype=torch.bool)
    mask[:, :held] = True
    for node, parent in enumerate(parents):
        for token in range(borders[node], borders[node + 1]):
            mask[token, held + borders[node] : held + token + 1] = True
            above = parent
            while above >= 0:
                mask[token, held + borders[above] : held + borders[above + 1]] = True
                above = parents[above]
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The definition, in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * SCALE).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("held", [0, 6])
def test_equal_to_the_definition(dtype: torch.dtype, bound: float, held: int) -> None:
    """Output and every gradient, relative to their size, of twelve trees with one, two and four heads of queries for
    each of keys."""
    for seed in range(12):
        torch.manual_seed(seed)
        borders, parents = random_tree(seed)
        groups = (1, 2, 4)[seed % 3]
        # Heads first in memory, as models have them.
        q, k, v = (
            torch.randn(heads, borders[-1], DIM, dtype=dtype).transpose(0, 1).requires_grad_()
            for heads in (HEADS, groups, groups)
        )
        above = [torch.randn(held, groups, DIM, dtype=dtype, requires_grad=True) for _ in range(2)]
        inputs = [q, k, v, *(above if held else ())]
        out = tree_attention(
            q,
            k,
            v,
            levels_of(borders, parents, held),
            SCALE,
            CpuKernel(),
            (above[0], above[1]) if held else None,
        )
        wanted = dense(q, torch.cat([above[0], k]), torch.cat([above[1], v]), seen(borders, parents, held))
        grad = torch.randn_like(out)
        pairs = [
            (out, wanted),
            *zip(
                torch.autograd.grad(out, inputs, grad),
                torch.autograd.grad(wanted, inputs, grad.double()),
                strict=True,
            ),
        ]
        for found, right in pairs:
            assert found.shape == right.shape and found.dtype == dtype
            assert float((found - right).detach().norm()) <= bound * float(right.detach().norm())


def test_flash_attn_is_called_in_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signatures of flash-attn 2.7's functions, which computes from their arguments, gives what the
    CPU's kernel gives. (The package itself needs a GPU.)"""
    cpu = CpuKernel()

    def at(cu_q: Tensor, cu_k: Tensor, causal: bool) -> Level:
        pairs = zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True)
        return level([(*queries, *keys) for queries, keys in pairs], causal)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        assert dropout_p == 0 and max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        out, lse, _ = cpu.forward(q, k, v, at(cu_seqlens_q, cu_seqlens_k, causal), softmax_scale)
        return out, lse, torch.empty(0), torch.tensor([7, len(q)])

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
    ) -> None:  # fmt: skip
        assert (window_size_left, window_size_right, softcap, alibi_slopes, deterministic) == (
            -1,
            -1,
            0,
            None,
            False,
        )
        assert rng_state is not None and rng_state.tolist() == [7, len(q)] and softmax_lse.is_contiguous()
        saved = Saved(q, k, v, out, softmax_lse, None)
        found = cpu.backward(dout, saved, at(cu_seqlens_q, cu_seqlens_k, causal), softmax_scale)
        for mine, theirs in zip((dq, dk, dv), found, strict=True):
            mine.copy_(theirs)

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = forward, backward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(FlashKernel, "merge", lambda _, *parts: cpu.merge(*parts))  # it is Triton's on a GPU
    for seed, held in ((1, 0), (2, 6)):
        borders, parents = random_tree(seed)
        torch.manual_seed(seed)
        q, k, v = (torch.randn(borders[-1], n, DIM, requires_grad=True) for n in (HEADS, 2, 2))
        key, value = (torch.randn(held, 2, DIM, requires_grad=True) for _ in range(2))
        inputs = [q, k, v, *((key, value) if held else ())]
        levels = levels_of(borders, parents, held)
        found, wanted = (
            tree_attention(q, k, v, levels, SCALE, kernel, (key, value) if held else None)
            for kernel in (FlashKernel(), cpu)
        )
        grad = torch.randn_like(found)
        pairs = zip(
            torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
        )
        assert torch.equal(found, wanted) and all(torch.equal(a, b) for a, b in pairs)


def test_neighbouring_segments_are_slices_and_others_are_gathered() -> None:
    """Where the queries of a level follow one another nothing is copied."""
    together = level([(3, 5, 0, 3), (5, 9, 3, 4)], causal=False)
    assert together.queries == slice(3, 9) and together.keys == slice(0, 4)
    apart = level([(1, 3, 0, 1), (4, 6, 3, 4)], causal=False)
    assert isinstance(apart.queries, Tensor) and apart.queries.tolist() == [1, 2, 4, 5]
    assert isinstance(apart.keys, Tensor) and apart.keys.tolist() == [0, 3]
    assert apart.cu_q.tolist() == [0, 2, 4] and apart.cu_k.tolist() == [0, 1, 2]
    assert (apart.longest_q, apart.longest_k) == (2, 1)
