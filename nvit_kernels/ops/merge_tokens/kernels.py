"""The kernels of merging tokens. A program has one image: similarities, ranks and means, with nothing in between.

Nothing is sorted: a token's rank is how many are nearer, its place is its own index less the sources before it, and
both are sums over a tile of comparisons. A mean is a product of the sources' sizes, one row for each odd token, with
the even tokens; even tokens that stay are copied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mean_keys(keys, key_heads, dims, stride_h, stride_n, first, count, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys of every second token from `first` on, their mean over heads, at length 1: `(BLOCK_T, BLOCK_D)`."""
    token, dim = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    there = (token < count)[:, None] & (dim < dims)[None, :]
    at = keys + (first + 2 * token)[:, None] * stride_n + dim[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for h in range(0, key_heads):
        total += tl.load(at + h * stride_h, mask=there, other=0.0).to(tl.float32)
    total /= key_heads
    length = tl.sqrt(tl.sum(total * total, 1))
    return total / tl.maximum(length, 1e-12)[:, None]


@triton.jit
def forward_kernel(
    x,  # (batch, tokens, width)
    keys,  # (batch, heads, tokens, dims), dims side by side
    sizes,  # (batch, tokens) float32; None: one each
    y,  # out: (batch, tokens - r, width)
    total,  # out: (batch, tokens - r) float32
    place,  # out: (batch, tokens) int64
    tokens,
    width,
    r,
    prefix,
    key_heads,
    dims,
    stride_b,  # of keys
    stride_h,
    stride_n,
    BLOCK_T: tl.constexpr,  # holds the even tokens
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels at a time
    BLOCK_O: tl.constexpr,  # odd tokens at a time
    EXACT: tl.constexpr,  # the product's operands are float32
):
    image = tl.program_id(0).to(tl.int64)
    left, evens, odds = tokens - r, (tokens - prefix + 1) // 2, (tokens - prefix) // 2
    token = tl.arange(0, BLOCK_T)
    even_at, even = prefix + 2 * token, token < evens

    keys += image * stride_b
    mine = _mean_keys(keys, key_heads, dims, stride_h, stride_n, prefix, evens, BLOCK_T, BLOCK_D)
    nearness = tl.full([BLOCK_T], -2.0, tl.float32)  # what a NaN never exceeds
    partner = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, odds, BLOCK_O):
        other = start + tl.arange(0, BLOCK_O)
        first = prefix + 1 + 2 * start
        theirs = _mean_keys(keys, key_heads, dims, stride_h, stride_n, first, odds - start, BLOCK_O, BLOCK_D)
        likeness = tl.dot(mine, tl.trans(theirs), input_precision="tf32x3")
        likeness = tl.where((likeness == likeness) & (other < odds)[None, :], likeness, -2.0)
        most = tl.max(likeness, 1)
        nearest = tl.min(tl.where(likeness == most[:, None], other[None, :], 2 * BLOCK_T), 1)
        partner = tl.where(most > nearness, nearest, partner)
        nearness = tl.maximum(most, nearness)
    nearness = tl.where(even, nearness, -3.0)
    nearer = nearness[None, :] > nearness[:, None]
    earlier = (nearness[None, :] == nearness[:, None]) & (token[None, :] < token[:, None])
    leaves = tl.sum((nearer | earlier).to(tl.int32), 1) < r
    # Sources before an odd token are those up to the even one beside it.
    gone = tl.sum(tl.where(leaves[None, :] & (token[None, :] < token[:, None]), 1, 0), 1)
    gone_at_partner = tl.sum(tl.where(leaves[None, :] & (token[None, :] <= partner[:, None]), 1, 0), 1)
    even_to = tl.where(leaves, prefix + 2 * partner + 1 - gone_at_partner, even_at - gone)

    place += image * tokens
    x += image * tokens * width
    y += image * left * width
    total += image * left
    even_size = even.to(tl.float32)
    if sizes is not None:
        sizes += image * tokens
        even_size = tl.load(sizes + even_at, mask=even, other=0.0)
    tl.store(place + even_at, even_to.to(tl.int64), mask=even)
    tl.store(total + even_to, even_size, mask=even & (leaves == 0))
    for c in range(0, width, BLOCK_C):  # even tokens that stay are copied
        col = c + tl.arange(0, BLOCK_C)
        inside = (even & (leaves == 0))[:, None] & (col < width)[None, :]
        row = tl.load(x + even_at[:, None] * width + col[None, :], mask=inside, other=0.0)
        tl.store(y + even_to[:, None] * width + col[None, :], row, mask=inside)
    for start in range(0, prefix, BLOCK_O):  # what never merges
        row = start + tl.arange(0, BLOCK_O)
        tl.store(place + row, row.to(tl.int64), mask=row < prefix)
        size = tl.full([BLOCK_O], 1.0, tl.float32)
        if sizes is not None:
            size = tl.load(sizes + row, mask=row < prefix, other=0.0)
        tl.store(total + row, size, mask=row < prefix)
        for c in range(0, width, BLOCK_C):
            col = c + tl.arange(0, BLOCK_C)
            inside = (row < prefix)[:, None] & (col < width)[None, :]
            at = row[:, None] * width + col[None, :]
            tl.store(y + at, tl.load(x + at, mask=inside, other=0.0), mask=inside)
    for start in range(0, odds, BLOCK_O):
        other = start + tl.arange(0, BLOCK_O)
        odd, odd_at = other < odds, prefix + 1 + 2 * other
        odd_to = odd_at - tl.sum(tl.where(leaves[None, :] & (token[None, :] <= other[:, None]), 1, 0), 1)
        odd_size = odd.to(tl.float32)
        if sizes is not None:
            odd_size = tl.load(sizes + odd_at, mask=odd, other=0.0)
        from_even = tl.where(leaves[None, :] & (partner[None, :] == other[:, None]), even_size[None, :], 0.0)
        size = odd_size + tl.sum(from_even, 1)
        tl.store(place + odd_at, odd_to.to(tl.int64), mask=odd)
        tl.store(total + odd_to, size, mask=odd)
        share = tl.where(odd, odd_size / tl.maximum(size, 1e-12), 0.0)
        if not EXACT:
            from_even = from_even.to(x.dtype.element_ty)
        for c in range(0, width, BLOCK_C):
            col = c + tl.arange(0, BLOCK_C)
            inside = (col < width)[None, :]
            even_x = tl.load(x + even_at[:, None] * width + col[None, :], mask=even[:, None] & inside, other=0.0)
            odd_x = tl.load(x + odd_at[:, None] * width + col[None, :], mask=odd[:, None] & inside, other=0.0)
            mean = tl.dot(from_even, even_x, input_precision="ieee") / tl.maximum(size, 1e-12)[:, None]
            mean += odd_x.to(tl.float32) * share[:, None]  # a token that nothing merges into stays as it is
            at = odd_to[:, None] * width + col[None, :]
            tl.store(y + at, mean.to(y.dtype.element_ty), mask=odd[:, None] & inside)


@triton.jit
def backward_kernel(
    dy,  # (batch, left, width)
    dtotal,  # (batch, left) float32; None: sizes have no gradient
    x,  # (batch, tokens, width); None where sizes have no gradient
    y,  # (batch, left, width)
    sizes,  # (batch, tokens) float32; None: one each
    total,  # (batch, left) float32
    place,  # (batch, tokens) int64
    dx,  # out: (batch, tokens, width)
    dsizes,  # out: (batch, tokens) float32; None: not wanted
    rows,  # tokens of all images
    tokens,
    left,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program has some tokens: each takes its share of the gradient of the mean that it went into."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    there = row < rows
    mean = row // tokens * left + tl.load(place + row, mask=there, other=0)
    whole = tl.load(total + mean, mask=there, other=1.0)
    size = tl.full([BLOCK_M], 1.0, tl.float32)
    if sizes is not None:
        size = tl.load(sizes + row, mask=there, other=0.0)
    towards = tl.zeros([BLOCK_M], tl.float32)
    for c in range(0, width, BLOCK_C):
        col = c + tl.arange(0, BLOCK_C)
        inside = there[:, None] & (col < width)[None, :]
        theirs, mine = mean[:, None] * width + col[None, :], row[:, None] * width + col[None, :]
        grad = tl.load(dy + theirs, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + mine, (grad * (size / whole)[:, None]).to(dx.dtype.element_ty), mask=inside)
        if dsizes is not None:
            step = tl.load(x + mine, mask=inside, other=0.0).to(tl.float32)
            step -= tl.load(y + theirs, mask=inside, other=0.0).to(tl.float32)
            towards += tl.sum(grad * step, 1)
    if dsizes is not None:
        tl.store(dsizes + row, towards / whole + tl.load(dtotal + mean, mask=there, other=0.0), mask=there)
