"""Two parts of attention over different keys made one: out = sum of exp(lse_i - lse) out_i, lse = log sum exp lse_i.

Where the parts are those of a prefix tree (mgrpo/ops/tree_attention.py) the second has some of the tokens alone: those
from `first` on, or those that `at` lists. One program takes BLOCK tokens of one head, and writes over the first part.
"""

import triton
import triton.language as tl

BLOCK = 16


@triton.jit
def tree_merge_kernel(
    out,  # (T, H, D), contiguous
    lse,  # f32 (H, T), contiguous
    more,  # (n, H, D), contiguous
    more_lse,  # f32 (H, n), contiguous
    at,  # i64 (n,), increasing; not read without LISTED
    first,
    tokens,
    n,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM or the next power of two
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    if LISTED:
        token = tl.load(at + places, mask=inside, other=0)
    else:
        token = (first + places).to(tl.int64)
    here, there = head * tokens + token, head * n + places
    old = tl.load(lse + here, mask=inside, other=0.0)
    new = tl.load(more_lse + there, mask=inside, other=0.0)
    highest = tl.maximum(old, new)
    both = highest + tl.log(tl.exp(old - highest) + tl.exp(new - highest))
    column = tl.arange(0, WIDTH)
    cells = inside[:, None] & (column < DIM)[None, :]
    mine = (token * HEADS + head)[:, None] * DIM + column[None, :]
    theirs = (places.to(tl.int64) * HEADS + head)[:, None] * DIM + column[None, :]
    a = tl.load(out + mine, mask=cells, other=0.0).to(tl.float32)
    b = tl.load(more + theirs, mask=cells, other=0.0).to(tl.float32)
    found = a * tl.exp(old - both)[:, None] + b * tl.exp(new - both)[:, None]
    tl.store(out + mine, found.to(out.dtype.element_ty), mask=cells)
    tl.store(lse + here, both, mask=inside)
