import pytest
import torch

from nvit_kernels import functional, reference
from nvit_kernels.kept import Kept
from nvit_kernels.ops.kept_layer_norm import op

pytestmark = pytest.mark.usefixtures("quick_interpreter")

DTYPES = [torch.float32, torch.float16]


def tensors(batch, tokens, width, dtype, residual=False):
    data = dict(x=torch.randn(batch, tokens, width) + 0.5, w=torch.randn(width), b=torch.randn(width))
    if residual:
        data["residual"] = torch.randn(batch, tokens, width)
    return {k: t.to(dtype) for k, t in data.items()}


def check(compare, data, keep, scores=None):
    def call(function):
        return lambda **arguments: function(keep=keep, eps=1e-6, **arguments)

    scores = {} if scores is None else dict(scores=scores)
    return compare(call(functional.kept_layer_norm), call(reference.kept_layer_norm), data, scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("width", [7, 8, 24, 40, 56, 104, 200, 496])
@pytest.mark.parametrize("which", ["dense", "two thirds", "one unit"])
def test_widths(compare, keeping, width, which, residual, dtype):
    check(compare, tensors(3, 50, width, dtype, residual), keeping(width, which), (3, width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 197, 198, 257])
def test_tokens(compare, keeping, tokens, dtype):
    check(compare, tensors(2, tokens, 40, dtype, residual=True), keeping(40, "two thirds"), (40,))


def test_pruned_channels_are_zero_whatever_they_held(compare, keeping):
    keep = keeping(40, "two thirds")
    data = tensors(2, 50, 40, torch.float32)
    before = functional.kept_layer_norm(**data, keep=keep)
    data["x"][..., ~keep.mask] = 1e4
    after = functional.kept_layer_norm(**data, keep=keep)
    assert torch.equal(before, after) and (after[..., ~keep.mask] == 0).all()
    assert check(compare, data, keep)["gradient of x"][..., ~keep.mask].abs().max() == 0


def test_strided_inputs_are_read_right():
    data = tensors(2, 9, 24, torch.float32, residual=True)
    strided = {k: torch.stack([t, t], -1)[..., 1] for k, t in data.items()}
    for result, expected in zip(*(functional.kept_layer_norm(**each) for each in (strided, data)), strict=True):
        assert torch.equal(result, expected)


def test_the_sum_alone_can_be_used():
    data = {k: t.requires_grad_() for k, t in tensors(2, 5, 24, torch.float32, residual=True).items()}
    functional.kept_layer_norm(**data)[1].sum().backward()
    assert torch.equal(data["x"].grad, torch.ones(2, 5, 24)) and torch.equal(data["residual"].grad, data["x"].grad)


def test_errors_say_what_is_wrong():
    data = tensors(2, 5, 24, torch.float32, residual=True)
    with pytest.raises(ValueError, match="expected \\(24,\\)"):
        op.kept_layer_norm(**{**data, "w": torch.ones(23)})
    with pytest.raises(ValueError, match="must agree"):
        op.kept_layer_norm(**{**data, "residual": data["residual"].half()})


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_opcheck(residual):
    data = {k: t.requires_grad_() for k, t in tensors(2, 3, 8, torch.float32, residual).items()}
    keep, scores = Kept.from_mask(torch.arange(8) % 3 > 0), torch.zeros(2, 8)
    x, w, b, r = data["x"], data["w"], data["b"], data.get("residual")
    arguments = (x, w, b, keep.mask, keep.count, 1e-6, r, None)
    torch.library.opcheck(op.operator, arguments)
    with torch.no_grad():
        y, total, stats = op.operator(*arguments)
    x, w, b = (t.detach() for t in (x, w, b))
    g = torch.randn_like(y)
    of_total = (g.clone(), total) if residual else (None, x)
    arguments = (g, *of_total, w, b, keep.mask, keep.count, stats, scores)
    torch.library.opcheck(op.operator_backward, arguments)
