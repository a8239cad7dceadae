"""What only a GPU can show: bf16, CUDA graphs, recompilation with the real compiler, repeatability of real launches."""

import pytest
import torch

from nvit_kernels import Kept, collect_scores_, functional, fuse, keep_, reference, ways
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def some(width):
    return Kept.from_mask(torch.arange(width, device="cuda") % 3 != 1)


def run(call, tensors, dtype):
    leaves = [t.to(dtype).detach().clone().requires_grad_() for t in tensors]
    out = call(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, device="cuda").to(tensors[0].dtype).to(dtype))
    return [out.detach(), *(t.grad for t in leaves)]


def assert_as_accurate(ours, eager, dtype, tensors, terms=1):
    """At most twice eager's error against float64, with some roundings of the largest value granted.

    Two in 16 bits, where the result's own rounding is what shows. In float32 it is the order of a sum that shows: the
    roundings of `terms` numbers, the longest sum behind a result, add up to about the root of that, while eager's order
    may hit the exact value. Two such sums are granted, since a gradient may be their difference (∂P less δ). On an H200
    eager hit it with one token (softmax of one logit is 1) and in sums of 257 to 514 terms: errors of 2.6e-7 to 1.7e-6
    where its own was 0.
    """
    rounded = [t.to(dtype) for t in tensors]
    granted = max(2.0, 2 * terms**0.5) if dtype == torch.float32 else 2.0
    for mine, its, exact in zip(run(ours, rounded, dtype), run(eager, rounded, dtype),
                                run(eager, rounded, torch.float64), strict=True):  # fmt: skip
        err, allowed = ((t.double() - exact).abs().max() for t in (mine, its))
        assert err <= 2 * allowed + granted * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "qk", "v"), [(1, 8, 24), (50, 24, 56), (197, 64, 64), (198, 40, 104), (257, 200, 200)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention(tokens, qk, v, masked, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, tokens, qk, device="cuda").to(dtype).unbind(0)
    value = torch.randn(2, 3, tokens, v, device="cuda").to(dtype)
    kept = (some(3), some(qk), some(v)) if masked else ()

    def call(module):
        return lambda q, k, v: module.attention(q, k, v, qk**-0.5, *kept)

    assert_as_accurate(call(functional), call(reference), dtype, [q, k, value], terms=max(tokens, qk, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "windows", "tokens", "qk", "v"), [(128, 64, 49, 32, 32), (3, 1, 197, 64, 64), (4, 2, 50, 24, 56)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_a_bias_and_a_window_mask(batch, windows, tokens, qk, v, masked, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, batch, 3, tokens, qk, device="cuda").to(dtype).unbind(0)
    value = torch.randn(batch, 3, tokens, v, device="cuda").to(dtype)
    bias = torch.randn(3, tokens, tokens, device="cuda")
    mask = torch.zeros(windows, tokens, tokens, device="cuda").masked_fill(
        bias.new_empty(tokens).uniform_() < 0.3, -100
    )
    kept = (some(3), some(qk), some(v)) if masked else ()

    def call(module):
        return lambda q, k, v, bias: module.attention(q, k, v, qk**-0.5, *kept, bias=bias, mask=mask)

    assert_as_accurate(call(functional), call(reference), dtype, [q, k, value, bias])
    assert_as_accurate(call(functional), call(reference), dtype, [q, k, value, bias.to(dtype)])


def test_the_gradient_of_a_bias_is_bitwise_repeatable():
    q, k, v = torch.randn(3, 128, 3, 49, 32, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(3, 49, 49, device="cuda", requires_grad=True)

    def gradient():
        out = functional.attention(q, k, v, 0.2, bias=bias)
        return torch.autograd.grad(out, bias, torch.ones_like(out))[0]

    first = gradient()
    assert first.abs().max() > 0 and all(torch.equal(first, gradient()) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.parametrize("name", ["mlp", "swiglu"])
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(197, 192, 768), (257, 104, 496), (1, 8, 24)])
def test_mlps_every_way(tokens, width, hidden, name, way, dtype):
    torch.manual_seed(0)
    inner = [(hidden, width), (hidden,)] * (2 if name == "swiglu" else 1)
    shapes = [(2, tokens, width), *inner, (width, hidden), (width,)]
    tensors = [torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in shapes]

    def call(module):
        return lambda *t: getattr(module, name)(*t, hidden=some(hidden))

    try:
        for op in (name, f"{name}_backward"):
            ways.prefer(op, way)
        assert_as_accurate(call(functional), call(reference), dtype, tensors, terms=max(2 * tokens, width, hidden))
    finally:
        for op in (name, f"{name}_backward"):
            ways.prefer(op, None)


@pytest.mark.parametrize("name", ["mlp", "swiglu"])
def test_the_fastest_way_is_measured_once_and_is_right(name, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ways, "_measured", {})
    inner = [(504, 104), (504,)] * (2 if name == "swiglu" else 1)
    tensors = [torch.randn(s, device="cuda") / s[-1] ** 0.5 for s in ((3, 99, 104), *inner, (104, 504), (104,))]

    def call(module):
        return lambda *t: getattr(module, name)(*t, hidden=some(504))

    for dtype in (torch.float16, torch.bfloat16):
        assert_as_accurate(call(functional), call(reference), dtype, tensors)
        assert_as_accurate(call(functional), call(reference), dtype, tensors)
    assert len(ways.measured()) == 2, "one entry a dtype"
    for times in ways.measured().values():
        assert {"whole", "gather"} <= set(times) and all(ms > 0 for ms in times.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 24, 200, 768])
def test_kept_layer_norm(width, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(s, device="cuda") for s in ((4, 197, width), (width,), (width,), (4, 197, width))]

    def call(module):
        return lambda x, w, b, r: sum(module.kept_layer_norm(x, w, b, some(width), residual=r))

    assert_as_accurate(call(functional), call(reference), dtype, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_dot_is_right_and_bitwise_repeatable(dtype):
    torch.manual_seed(0)
    w, g = ({"w": torch.randn(3072, 768, device="cuda").to(dtype)} for _ in range(2))
    slices = [DotSlice("w", 0, None, (3072, 768), 0, 0), DotSlice("w", 0, None, (3072, 768), 1, 3072)]
    plan = GroupDotPlan(slices, {"w": (3072, 768)})
    first = functional.group_dot(w, g, plan)
    assert all(torch.equal(first, functional.group_dot(w, g, plan)) for _ in range(20))
    exact = reference.group_dot({"w": w["w"].double()}, {"w": g["w"].double()}, plan)
    assert (first - exact).abs().max() <= 1e-5 * exact.abs().max()


def block():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    made = timm.models.vision_transformer.Block(192, 3, qkv_bias=True).cuda().eval()
    return fuse(made, masks(0))


def masks(shift):
    sizes = {"emb": 192, "heads": 3, "qk_dim": 64, "v_dim": 64, "mlp": 768}
    return {name: torch.arange(size, device="cuda") % 3 != shift for name, size in sizes.items()}


@pytest.mark.parametrize("scoring", [False, True])
def test_compiled_and_never_again(scoring):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = block(), torch.randn(4, 197, 192, device="cuda")
    collect_scores_(model, 4 if scoring else 0)
    compiled = torch.compile(model, fullgraph=True)
    for shift in range(3):
        keep_(model, masks(shift))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for f, i in zip((model, compiled), inputs, strict=True):
            f(i).square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_captured_graph_follows_new_masks():
    model, x = block(), torch.randn(4, 197, 192, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for shift in (1, 2):
            keep_(model, masks(shift))
            graph.replay()
            torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-3)
