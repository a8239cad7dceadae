"""The kernels of merging tokens: keys become one a token, a program an image chooses by them, then rows are moved.

Nothing is sorted: a token's rank is how many are nearer, its place its own index less the sources before it, and both
are sums over a tile of comparisons. What merges into a token is a chain: its first source, and after each source the
next one. Rows are read and written once, and only those of sources a second time, by the token they merge into.

Numbers of tokens are not specialised: they differ from block to block, and each would be compiled for anew.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def keys_kernel(
    keys,  # (batch, heads, tokens, dims), dims side by side
    unit,  # out: (batch, tokens, dims) float32, their mean over heads at length 1
    tokens,
    key_heads,
    dims,
    stride_b,  # of keys
    stride_h,
    stride_n,
    BLOCK_M: tl.constexpr,  # tokens
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads at a time
):
    """A program has some tokens of one image."""
    down = tl.cdiv(tokens, BLOCK_M)
    image = (tl.program_id(0) // down).to(tl.int64)
    token, dim = (tl.program_id(0) % down) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    there = (token < tokens)[:, None] & (dim < dims)[None, :]
    at = keys + image * stride_b + token[:, None] * stride_n + dim[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for some in range(0, key_heads, BLOCK_H):
        for h in tl.static_range(BLOCK_H):  # unrolled, so that loads wait for memory together
            head = some + h
            total += tl.load(at + head * stride_h, mask=there & (head < key_heads), other=0.0).to(tl.float32)
    total /= key_heads
    length = tl.maximum(tl.sqrt(tl.sum(total * total, 1)), 1e-12)
    tl.store(unit + image * tokens * dims + token[:, None] * dims + dim[None, :], total / length[:, None], mask=there)


@triton.jit(do_not_specialize=["tokens", "r", "prefix"])
def match_kernel(
    unit,  # (batch, tokens, dims) float32
    sizes,  # (batch, tokens) float32; None: one each
    total,  # out: (batch, tokens - r) float32
    place,  # out: (batch, tokens) int64
    stays,  # out: (batch, tokens - r) int32, the token at each place that stays there
    following,  # out: (batch, tokens) int32, its first source, of a source the next one; negative: none
    tokens,
    r,
    prefix,
    dims,
    BLOCK_T: tl.constexpr,  # holds the even tokens
    BLOCK_D: tl.constexpr,  # dims at a time
):
    """A program has one image."""
    image = tl.program_id(0).to(tl.int64)
    evens, odds = (tokens - prefix + 1) // 2, (tokens - prefix) // 2
    token, some = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    even, odd = token < evens, token < odds

    unit += (image * tokens + prefix) * dims
    likeness = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)  # (even token, odd token)
    for d in range(0, dims, BLOCK_D):
        inside = (d + some < dims)[None, :]
        at = unit + 2 * token[:, None] * dims + d + some[None, :]
        mine = tl.load(at, mask=even[:, None] & inside, other=0.0)
        theirs = tl.load(at + dims, mask=odd[:, None] & inside, other=0.0)
        likeness += tl.dot(mine, tl.trans(theirs), input_precision="tf32x3")
    likeness = tl.where((likeness == likeness) & odd[None, :], likeness, -2.0)  # a NaN is nobody's nearest
    nearness, partner = tl.max(likeness, 1, return_indices=True)  # of equals the first

    # Sums go down the columns of a tile: of a vector along a row a thread holds few elements, down a column many.
    even_at, odd_at = prefix + 2 * token, prefix + 1 + 2 * token
    nearness = tl.where(even, nearness, -3.0)
    nearer = nearness[:, None] > nearness[None, :]
    earlier = (nearness[:, None] == nearness[None, :]) & (token[:, None] < token[None, :])
    leaves = tl.sum((nearer | earlier).to(tl.int32), 0) < r
    remains = even & (leaves == 0)
    # Sources before an odd token are those up to the even one beside it; before an even one that stays, the same.
    gone = tl.sum((leaves[:, None] & (token[:, None] <= token[None, :])).to(tl.int32), 0)
    even_to, odd_to = even_at - gone, odd_at - gone
    target = leaves[None, :] & (token[:, None] == partner[None, :])  # (odd token, source that merges into it)
    source_to = tl.sum(tl.where(target, odd_to[:, None], 0), 0)
    beside = leaves[:, None] & (partner[:, None] == partner[None, :]) & (token[:, None] > token[None, :])
    next_source = tl.min(tl.where(beside, even_at[:, None], tokens), 0)
    place += image * tokens
    following += image * tokens
    total += image * (tokens - r)
    stays += image * (tokens - r)
    tl.store(place + even_at, tl.where(leaves, source_to, even_to).to(tl.int64), mask=even)
    tl.store(place + odd_at, odd_to.to(tl.int64), mask=odd)
    tl.store(stays + even_to, even_at, mask=remains)
    tl.store(stays + odd_to, odd_at, mask=odd)
    tl.store(following + even_at, tl.where(leaves & (next_source < tokens), next_source, -1), mask=even)
    even_size, odd_size = even.to(tl.float32), odd.to(tl.float32)
    if sizes is not None:
        sizes += image * tokens
        even_size = tl.load(sizes + even_at, mask=even, other=0.0)
        odd_size = tl.load(sizes + odd_at, mask=odd, other=0.0)
    merges = leaves[:, None] & (partner[:, None] == token[None, :])  # (source, odd token it merges into)
    first_source = tl.min(tl.where(merges, even_at[:, None], tokens), 0)
    tl.store(following + odd_at, tl.where(first_source < tokens, first_source, -1), mask=odd)
    tl.store(total + even_to, even_size, mask=remains)
    tl.store(total + odd_to, odd_size + tl.sum(tl.where(merges, even_size[:, None], 0.0), 0), mask=odd)
    for start in range(0, prefix, BLOCK_T):  # what never merges
        row = start + tl.arange(0, BLOCK_T)
        size = tl.full([BLOCK_T], 1.0, tl.float32)
        if sizes is not None:
            size = tl.load(sizes + row, mask=row < prefix, other=0.0)
        tl.store(place + row, row.to(tl.int64), mask=row < prefix)
        tl.store(following + row, tl.full([BLOCK_T], -1, tl.int32), mask=row < prefix)
        tl.store(stays + row, row, mask=row < prefix)
        tl.store(total + row, size, mask=row < prefix)


@triton.jit(do_not_specialize=["tokens", "left"])
def means_kernel(
    x,  # (batch, tokens, width)
    sizes,  # (batch, tokens) float32; None: one each
    y,  # out: (batch, left, width)
    total,  # (batch, left) float32
    stays,  # (batch, left) int32
    following,  # (batch, tokens) int32
    tokens,
    left,
    width,
    BLOCK_M: tl.constexpr,  # rows of y
    BLOCK_C: tl.constexpr,
):
    """A program has some rows of one image, some channels: each is the token that stays, a step towards every source.

    So a token that nothing merges into, and equal tokens, come out to the bit as they were.
    """
    across, down = tl.cdiv(width, BLOCK_C), tl.cdiv(left, BLOCK_M)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    image = (tile // down).to(tl.int64)
    row = (tile % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = column * BLOCK_C + tl.arange(0, BLOCK_C)
    there, inside = row < left, (col < width)[None, :]
    x += image * tokens * width
    following += image * tokens
    token = tl.load(stays + image * left + row, mask=there, other=0)
    source = tl.load(following + token, mask=there, other=-1)
    whole = tl.load(total + image * left + row, mask=there, other=1.0)
    mine = tl.load(x + token[:, None] * width + col[None, :], mask=there[:, None] & inside, other=0.0)
    mine = mine.to(tl.float32)
    mean = mine
    while tl.max(source, 0) >= 0:
        merges = source >= 0
        share = 1 / whole
        if sizes is not None:
            share = tl.load(sizes + image * tokens + source, mask=merges, other=0.0) / whole
        theirs = tl.load(x + source[:, None] * width + col[None, :], mask=merges[:, None] & inside, other=0.0)
        mean = tl.where(merges[:, None], mean + (theirs.to(tl.float32) - mine) * share[:, None], mean)
        source = tl.load(following + source, mask=merges, other=-1)
    at = y + image * left * width + row[:, None] * width + col[None, :]
    tl.store(at, mean.to(y.dtype.element_ty), mask=there[:, None] & inside)


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
