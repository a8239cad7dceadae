"""Merged tokens on a GPU: by the definition in float64, with gradients, in graphs, the same bits twice."""

import pytest
import torch

from nvit_kernels import functional, reference
from nvit_kernels.ops.merge_tokens import op
from tests.nvit_kernels.merged import check_choice, check_means, given_tokens, likeness_of, place_by_definition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("nan_filled_memory"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # tokens, r, prefix, heads, dims, width
    (1, 0, 0, 1, 8, 8), (1, 0, 5, 3, 24, 7), (2, 1, 0, 1, 16, 24), (3, 1, 1, 2, 40, 1), (17, 0, 1, 3, 64, 192),
    (33, 16, 0, 3, 24, 70), (50, 8, 1, 5, 32, 200), (65, 32, 1, 3, 64, 192), (66, 5, 3, 16, 64, 1024),
    (130, 62, 5, 2, 128, 64), (197, 16, 1, 3, 64, 192), (197, 16, 1, 12, 64, 768), (198, 98, 2, 6, 24, 496),
    (201, 25, 5, 13, 80, 96), (256, 128, 0, 1, 64, 33), (257, 128, 1, 12, 56, 760), (257, 1, 1, 4, 104, 384),
]  # fmt: skip


def on_gpu(batch, tokens, dtype=torch.float32, **shape):
    x, keys, sizes = given_tokens(batch, tokens, **shape)
    # Strides of the projection stay, as models have them.
    return x.cuda().to(dtype), keys.cuda().to(dtype), None if sizes is None else sizes.cuda()


def check(x, keys, sizes, r, prefix):
    """All of a merge by its definition, and the same bits when it runs again."""
    found = functional.merge_tokens(x, keys, sizes, r, prefix)
    y, total, place = found
    assert [t.dtype for t in found] == [x.dtype, torch.float32, torch.int64]
    check_choice(likeness_of(keys, prefix).cpu(), r, prefix, place.cpu())
    check_means(x, sizes, y, total, place)
    assert all(map(torch.equal, found, functional.merge_tokens(x, keys, sizes, r, prefix)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "r", "prefix", "heads", "dims", "width"), SHAPES)
@pytest.mark.parametrize("sizes", [True, False])
def test_by_the_definition(sizes, tokens, r, prefix, heads, dims, width, dtype):
    x, keys, sizes = on_gpu(3, tokens, dtype, heads=heads, dims=dims, width=width, sizes=sizes, seed=tokens)
    assert functional.merge_tokens_takes(x, keys, prefix) == (tokens > prefix)
    check(x, keys, sizes, r, prefix)


@pytest.mark.parametrize("r", [0, 1, 16, 50, 98])
def test_any_number_of_many_images(r):
    x, keys, sizes = on_gpu(300, 197, torch.bfloat16, dims=64, width=72)
    check(x, keys, sizes, r, 1)


def test_every_number_of_tokens():
    for tokens in range(1, 258):
        prefix = tokens % 6
        x, keys, sizes = on_gpu(2, tokens, width=24, sizes=tokens % 2 == 0, seed=tokens)
        check(x, keys, sizes, max(0, tokens - prefix) // (2 + tokens % 3), prefix)


def test_sizes_beyond_what_16_bits_count():
    x, keys, sizes = on_gpu(2, 50, torch.bfloat16)
    check(x, keys, sizes + 256, 12, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [40, 131, 257])
def test_ties_among_duplicates(tokens, dtype):
    """Five kinds of token, whose cosines are 0 or 1 however they are rounded."""
    x, _, sizes = on_gpu(4, tokens, dtype)
    kind = torch.randint(0, 5, (4, 1, tokens), generator=torch.Generator().manual_seed(1))
    keys = torch.eye(8)[kind].cuda().to(dtype)
    for r in (1, tokens // 4, (tokens - 1) // 2):
        y, total, place = functional.merge_tokens(x, keys, sizes, r, 1)
        assert torch.equal(place.cpu(), place_by_definition(keys.cpu(), r, 1))
        check_means(x, sizes, y, total, place)


def test_equal_tokens_stay_as_they_are():
    x, keys = torch.full((2, 200, 40), 0.3, device="cuda"), torch.ones(2, 3, 200, 24, device="cuda")
    y, total, place = functional.merge_tokens(x, keys, None, 99, 2)
    assert torch.equal(y, x[:, :101]) and total[:, 2].tolist() == [100, 100]
    assert torch.equal(place.cpu(), place_by_definition(keys.cpu(), 99, 2))


@pytest.mark.parametrize("missing", [[5], [6], [1, 2, 3, 19], list(range(20))])
def test_a_nan_is_nobodys_nearest_and_stays_in_its_image(missing):
    x, keys, _ = on_gpu(2, 20)
    clean = functional.merge_tokens(x, keys, None, 4, 1)
    keys = keys.clone()
    keys[0, 0, missing, 3] = torch.nan
    found = functional.merge_tokens(x, keys, None, 4, 1)
    assert found[0].isfinite().all()
    assert torch.equal(found[2].cpu(), place_by_definition(keys.cpu(), 4, 1))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(found, clean, strict=True))


def gradients(x, sizes, place, dy, dtotal, dtype):
    """Of the reference's means and sizes at these places, in a dtype."""
    leaves = [
        t.detach().to(dtype).requires_grad_() for t in (x, torch.ones_like(x[..., 0]) if sizes is None else sizes)
    ]
    whole = torch.zeros(dtotal.shape, device="cuda", dtype=dtype).scatter_add(1, place, leaves[1])
    sums = torch.zeros(dy.shape, device="cuda", dtype=dtype)
    sums = sums.scatter_add(1, place[..., None].expand_as(x), leaves[0] * leaves[1][..., None])
    return torch.autograd.grad((sums / whole[..., None], whole), leaves, (dy.to(dtype), dtotal.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "r", "prefix", "width"), [(2, 1, 0, 8), (50, 8, 1, 200), (197, 16, 1, 768), (257, 128, 1, 33)]
)
@pytest.mark.parametrize("sized", [True, False])
def test_gradients(sized, tokens, r, prefix, width, dtype):
    x, keys, sizes = on_gpu(3, tokens, dtype, width=width, sizes=sized)
    leaves = [t.requires_grad_() for t in (x, sizes) if t is not None]
    y, total, place = functional.merge_tokens(x, keys, sizes, r, prefix)
    dy, dtotal = torch.randn_like(y), torch.randn_like(total)
    out, along = ((y, total), (dy, dtotal)) if sized else ((y,), (dy,))
    found = torch.autograd.grad(out, leaves, along, retain_graph=True)
    again = torch.autograd.grad(out, leaves, along)
    assert all(map(torch.equal, found, again))
    exact = gradients(x, sizes, place, dy, dtotal, torch.float64)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), exact[0], rtol=eps, atol=1e-6)
    if sized:  # a sum over channels of ∂y (x - y), where y is rounded to x's dtype
        allowed = eps * (dy.double().abs() * y.detach().double().abs()).sum(-1).max() + 1e-5 * width**0.5
        assert (found[1].double() - exact[1]).abs().max() <= allowed


def test_compiled_in_one_graph():
    x, keys, sizes = on_gpu(4, 197, torch.bfloat16, dims=64, width=192)
    expected = functional.merge_tokens(x, keys, sizes, 16, 1)
    compiled = torch.compile(lambda *t: functional.merge_tokens(*t, 16, 1), fullgraph=True)
    assert all(map(torch.equal, compiled(x, keys, sizes), expected))
    torch.library.opcheck(torch.ops.nvit.merge_tokens.default, (x.float().requires_grad_(), keys, sizes, 16, 1))


def test_a_compiled_step_has_the_eager_gradients():
    x, keys, sizes = on_gpu(4, 50, dims=64, width=192)

    def step(x, keys, sizes):
        y, total, _ = functional.merge_tokens(x, keys, sizes, 8, 1)
        return (y.square().sum(-1) * total).sum()

    found = []
    for call in (step, torch.compile(step, fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, sizes)]
        found.append(torch.autograd.grad(call(leaves[0], keys, leaves[1]), leaves))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_a_captured_graph_follows_new_values():
    x, keys, sizes = on_gpu(4, 197, torch.bfloat16, dims=64, width=192)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op.merge_tokens(x, keys, sizes, 16, 1)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        found = functional.merge_tokens(x, keys, sizes, 16, 1)
    for seed in (1, 2):
        new = on_gpu(4, 197, torch.bfloat16, dims=64, width=192, seed=seed)
        for old, value in zip((x, keys, sizes), new, strict=True):
            old.copy_(value)
        graph.replay()
        assert all(map(torch.equal, found, functional.merge_tokens(*new, 16, 1)))


def test_more_tokens_than_a_program_holds_take_plain_torch():
    x, keys, sizes = on_gpu(2, 300)
    assert not functional.merge_tokens_takes(x, keys, 1)
    found, expected = (f(x, keys, sizes, 20, 1) for f in (functional.merge_tokens, reference.merge_tokens))
    torch.testing.assert_close(found[0], expected[0])
