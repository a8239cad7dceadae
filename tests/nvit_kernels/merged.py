"""What merged tokens have to be, whoever merged them: which ones may merge, and their means by the definition."""

import torch

from nvit_kernels import reference

CLOSE = 1e-5
"""Cosines nearer to each other than this may change places by rounding."""


def given_tokens(batch, tokens, heads=3, dims=24, width=20, sizes=True, seed=0):
    """x, keys as a fused projection gives them, sizes or None."""
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3 * heads * dims, generator=g)
    keys = qkv.unflatten(-1, (3, heads, dims)).permute(2, 0, 3, 1, 4)[1]
    counts = torch.randint(1, 5, (batch, tokens), generator=g).float()
    return torch.randn(batch, tokens, width, generator=g), keys, counts if sizes else None


def likeness_of(keys, prefix):
    """Cosines of even and odd tokens in float64; a NaN is nobody's nearest."""
    mean = torch.nn.functional.normalize(keys.double().mean(1), dim=-1)[:, prefix:]
    return (mean[:, ::2] @ mean[:, 1::2].mT).nan_to_num(nan=-2.0)


def place_by_definition(keys, r, prefix):
    """Where each token goes, image by image and token by token."""
    places = []
    for likeness in likeness_of(keys, prefix):
        order = sorted(range(len(likeness)), key=lambda i: -float(likeness[i].max())) if r else []
        into = {prefix + 2 * i: prefix + 1 + 2 * int(likeness[i].argmax()) for i in order[:r]}
        stays = [n for n in range(keys.shape[2]) if n not in into]
        places.append([stays.index(into.get(n, n)) for n in range(keys.shape[2])])
    return torch.tensor(places, dtype=torch.int64).view(keys.shape[0], keys.shape[2])


def check_means(x, sizes, y, total, place):
    """Means and sizes follow from places: in float64, and to the bit where nothing merges."""
    weights = torch.ones_like(x[..., 0], dtype=torch.float64) if sizes is None else sizes.double()
    sums = torch.zeros_like(y, dtype=torch.float64)
    sums.scatter_add_(1, place[..., None].expand_as(x), x.double() * weights[..., None])
    exact = torch.zeros_like(total, dtype=torch.float64).scatter_add_(1, place, weights)
    assert torch.equal(total.double(), exact)
    # The means of values of up to about four, and one rounding of the result where it has 16 bits.
    atol, rtol = 4e-6, 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    torch.testing.assert_close(y.double(), sums / exact[..., None], rtol=rtol, atol=atol)
    alone = torch.zeros_like(total).scatter_add_(1, place, torch.ones_like(total[:, :1]).expand(x.shape[:2]))
    assert torch.equal(reference.unmerge_tokens(y, place)[alone.gather(1, place) == 1], x[alone.gather(1, place) == 1])


def check_choice(likeness, r, prefix, place):
    """Sources go to the most alike odd token, and are nearest of all, as far as float32 can tell."""
    for each, where in zip(likeness, place, strict=True):
        even, odd = where[prefix::2], where[prefix + 1 :: 2]
        goes = (even[:, None] == odd[None, :]).double()
        leaves = goes.any(1)
        assert int(leaves.sum()) == r
        if r:
            nearness = each.max(1).values
            assert ((goes * (nearness[:, None] - each))[leaves] < CLOSE).all()
            others = nearness[~leaves]
            assert not len(others) or nearness[leaves].min() > others.max() - CLOSE
        stays = torch.ones(len(where), dtype=torch.bool)
        stays[prefix::2] = ~leaves
        assert torch.equal(where[stays], torch.arange(len(where) - r))
