import pytest
import torch

from nvit_kernels import functional, reference, ways
from nvit_kernels.kept import Kept
from nvit_kernels.ops.mlp import op
from nvit_kernels.ops.swiglu import op as gated

DTYPES = [torch.float32, torch.float16]
WIDTHS = [(8, 24, 8), (24, 104, 40), (56, 200, 56), (40, 496, 24)]
OPS = ["mlp", "swiglu"]


@pytest.fixture(params=ways.WAYS)
def way(request):
    """Each way an op can take; on a GPU a measurement chooses."""
    for name in ways.OPS:
        ways.prefer(name, request.param)
    yield request.param
    for name in ways.OPS:
        ways.prefer(name, None)


def tensors(name, batch, tokens, width, hidden, out, dtype, bias=True):
    shapes = dict(x=(batch, tokens, width), w1=(hidden, width), b1=(hidden,), w2=(out, hidden), b2=(out,))
    if name == "swiglu":
        shapes = dict(x=(batch, tokens, width), w_gate=(hidden, width), b_gate=(hidden,), w_value=(hidden, width),
                      b_value=(hidden,), w2=(out, hidden), b2=(out,))  # fmt: skip
    made = {k: (torch.randn(s) / (s[-1] ** 0.5 if len(s) == 2 else 1)).to(dtype) for k, s in shapes.items()}
    return {k: None if k.startswith("b") and not bias else t for k, t in made.items()}


def check(compare, name, data, hidden, scores):
    def call(module):
        return lambda **arguments: getattr(module, name)(hidden=hidden, **arguments)

    return compare(call(functional), call(reference), data, dict(scores=scores))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "hidden", "out"), WIDTHS)
@pytest.mark.parametrize("which", ["dense", "two thirds", "one unit"])
@pytest.mark.parametrize("name", OPS)
def test_widths(compare, keeping, way, name, width, hidden, out, which, dtype):
    check(compare, name, tensors(name, 3, 50, width, hidden, out, dtype), keeping(hidden, which), (3, hidden))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 197, 198, 257])
@pytest.mark.parametrize("name", OPS)
def test_tokens(compare, keeping, name, tokens, dtype):
    data = tensors(name, 2, tokens, 24, 40, 24, dtype)
    check(compare, name, data, keeping(40, "everything"), (2, 40))


@pytest.mark.parametrize("name", OPS)
def test_scores_of_a_batch_without_biases(compare, keeping, way, name):
    data = tensors(name, 2, 50, 24, 104, 24, torch.float32, bias=False)
    check(compare, name, data, keeping(104, "two thirds"), (104,))


def test_scores_equal_weight_times_gradient(compare, keeping, way):
    data = tensors("mlp", 3, 50, 24, 104, 40, torch.float32)
    got = check(compare, "mlp", data, keeping(104, "two thirds"), (3, 104))
    columns = (data["w2"] * got["gradient of w2"]).sum(0)
    torch.testing.assert_close(got["scores"].sum(0), columns, rtol=0, atol=2e-6 * columns.abs().max().item() * 104)


def test_pruned_weights_have_exactly_no_gradient(compare, keeping, way):
    data = tensors("mlp", 3, 50, 24, 104, 40, torch.float32)
    gone = ~keeping(104, "two thirds").mask
    got = check(compare, "mlp", data, keeping(104, "two thirds"), (3, 104))
    assert (got["gradient of w1"][gone] == 0).all() and (got["gradient of b1"][gone] == 0).all()
    assert (got["gradient of w2"][:, gone] == 0).all() and (got["scores"][:, gone] == 0).all()


@pytest.mark.parametrize("name", OPS)
def test_scoring_needs_no_weight_gradients(way, name):
    data = tensors(name, 2, 50, 24, 104, 24, torch.float32)
    data["x"].requires_grad_()
    scores, expected = torch.zeros(2, 104), torch.zeros(2, 104)
    getattr(functional, name)(**data, scores=scores).square().sum().backward()
    getattr(reference, name)(**data, scores=expected).square().sum().backward()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("forward", ways.WAYS)
@pytest.mark.parametrize("backward", ways.WAYS)
@pytest.mark.parametrize("name", OPS)
def test_a_step_goes_one_way_forward_and_backward(compare, keeping, name, forward, backward):
    """Whatever is preferred without gradients, and changed between the passes: a backward reads what its own left."""
    hidden, data = keeping(104, "two thirds"), tensors(name, 2, 50, 24, 104, 40, torch.float32)
    ways.prefer(name, forward)
    ways.prefer(f"{name}_backward", backward)
    try:
        check(compare, name, data, hidden, (2, 104))
        leaves = {k: t.clone().requires_grad_() for k, t in data.items()}
        out = getattr(functional, name)(hidden=hidden, **leaves)
        ways.prefer(f"{name}_backward", forward)
        out.sum().backward()
        expected = {k: t.clone().requires_grad_() for k, t in data.items()}
        getattr(reference, name)(hidden=hidden, **expected).sum().backward()
        for k, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, expected[k].grad, rtol=1e-4, atol=1e-4)
    finally:
        ways.prefer(name, None)
        ways.prefer(f"{name}_backward", None)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("scores", [None, (2, 104), (104,)])
def test_scores_and_gradients_of_some_operands_alone(compare, way, name, scores):
    """Each gradient by itself equals that of all together: nothing else is needed for it."""
    data, hidden = tensors(name, 2, 9, 24, 104, 40, torch.float32), Kept.from_mask(torch.arange(104) % 3 != 1)

    def step(wanted):
        leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in data.items()}
        buffer = None if scores is None else torch.zeros(scores)
        getattr(functional, name)(hidden=hidden, scores=buffer, **leaves).square().sum().backward()
        return {k: leaves[k].grad for k in wanted}, buffer

    everything, total = step(data)
    for k in data:
        alone, buffer = step([k])
        assert torch.equal(alone[k], everything[k]), k
        assert k in ("w2", "b2") or scores is None or torch.equal(buffer, total)


def test_without_gradients_the_product_becomes_the_activation(monkeypatch):
    """Nothing of the hidden width is allocated but the product itself."""
    data, places = tensors("mlp", 2, 9, 24, 40, 24, torch.float32), []
    ways.prefer("mlp", "whole")
    run = op.whole.gelu_kernel.run
    monkeypatch.setattr(op.whole.gelu_kernel, "run", lambda *a, **k: places.append(a) or run(*a, **k))
    with torch.no_grad():
        out = functional.mlp(**data)
    ways.prefer("mlp", None)
    u, _, _, a, *_ = places[0]
    assert u is a
    torch.testing.assert_close(out, reference.mlp(**data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_strided_inputs_are_read_right(way, name):
    data = tensors(name, 2, 9, 24, 40, 24, torch.float32)
    strided = {k: torch.stack([t, t], -1)[..., 1] for k, t in data.items()}
    result, expected = (getattr(functional, name)(**each) for each in (strided, data))
    assert torch.equal(result, expected)


def test_errors_say_what_is_wrong():
    data = tensors("mlp", 2, 8, 24, 40, 24, torch.float32)
    with pytest.raises(ValueError, match="have shapes"):
        op.mlp(**{**data, "w2": torch.randn(24, 48)})
    with pytest.raises(ValueError, match="cast them"):
        op.mlp(**{**data, "w2": data["w2"].half()})
    with pytest.raises(ValueError, match="no way 'fast'"):
        ways.prefer("mlp", "fast")


@pytest.mark.parametrize("way", ["whole", "fused"], indirect=True)
@pytest.mark.parametrize("module", [op, gated])
def test_opcheck(module, way):
    name = module.__name__.split(".")[-2]
    data = [t.requires_grad_() for t in tensors(name, 2, 4, 8, 16, 8, torch.float32).values()]
    hidden, scores = Kept.from_mask(torch.arange(16) % 3 > 0), torch.zeros(2, 16)
    lists = (hidden.index, hidden.count, hidden.mask)
    arguments = (*data, *lists, None)
    torch.library.opcheck(module.operator, arguments)
    with torch.no_grad():
        y, *saved = module.operator(*arguments)
    x, *weights = (t.detach() for t in data)
    wants = [True] * len(data)
    torch.library.opcheck(module.operator_backward, (torch.randn_like(y), x, *saved, *weights, *lists, scores, wants))
