"""The references against what they are defined to be, and the dispatch between them and the kernels."""

import subprocess
import sys

import torch
import torch.nn.functional as F

from nvit_kernels import Kept, functional, reference

torch.manual_seed(0)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_attention_equals_the_sliced_dense_one():
    q, k, v = double(2, 3, 9, 8), double(2, 3, 9, 8), double(2, 3, 9, 16)
    heads, qk, dims = torch.tensor([True, False, True]), torch.arange(8) > 2, torch.arange(16) % 3 > 0
    out = functional.attention(q, k, v, 0.25, *(Kept.from_mask(m) for m in (heads, qk, dims)))
    sliced = F.scaled_dot_product_attention(
        q[:, heads][..., qk], k[:, heads][..., qk], v[:, heads][..., dims], scale=0.25
    )
    expected = torch.zeros_like(v)
    expected[:, heads] = expected[:, heads].index_copy(-1, dims.nonzero().squeeze(1), sliced)
    torch.testing.assert_close(out, expected)


def test_bias_and_window_mask_equal_one_mask_of_every_sample():
    q, k, v, bias, mask = double(6, 3, 9, 8), double(6, 3, 9, 8), double(6, 3, 9, 16), double(3, 9, 9), double(2, 9, 9)
    heads = torch.tensor([True, False, True])
    leaves, copies = ([t.clone().requires_grad_() for t in (q, k, v, bias)] for _ in range(2))
    out = functional.attention(*leaves[:3], 0.25, Kept.from_mask(heads), bias=leaves[3], mask=mask)
    each = copies[3] + torch.cat([mask] * 3).unsqueeze(1)  # sample i meets window i modulo 2
    expected = F.scaled_dot_product_attention(*copies[:3], attn_mask=each, scale=0.25) * heads[:, None, None]
    torch.testing.assert_close(out, expected)
    for t in (out, expected):
        t.square().sum().backward()
    for mine, its in zip(leaves, copies, strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_scores_are_gradients_of_gates():
    """A score is the gradient of a factor of 1 on the unit where it leaves the network, per sample."""
    q, k, v = (double(2, 3, 9, 8) for _ in range(3))
    gates = {name: torch.ones(2, n, dtype=torch.float64, requires_grad=True) for name, n in
             (("head", 3), ("qk", 8), ("v", 8))}  # fmt: skip
    scores = {f"{name}_scores": torch.zeros_like(gate, requires_grad=False) for name, gate in gates.items()}
    q.requires_grad_()
    functional.attention(q, k, v, 0.3, **scores).square().sum().backward()
    gated = reference.attention(q * gates["qk"][:, None, None], k, v, 0.3)
    (gated * gates["head"][:, :, None, None] * gates["v"][:, None, None]).square().sum().backward()
    for name, gate in gates.items():
        torch.testing.assert_close(scores[f"{name}_scores"], gate.grad)


def test_mlp_scores_equal_fc2_columns_times_gradient():
    x, w1, b1, w2, b2 = double(3, 5, 8), double(24, 8), double(24), double(8, 24), double(8)
    for t in (x, w1, b1, w2, b2):
        t.requires_grad_()
    hidden = Kept.from_mask(torch.arange(24) % 4 > 0)
    per_sample, total = torch.zeros(3, 24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    for scores in (per_sample, total):
        w2.grad = None
        functional.mlp(x, w1, b1, w2, b2, hidden, scores).square().sum().backward()
    torch.testing.assert_close(per_sample.sum(0), (w2 * w2.grad).sum(0))
    torch.testing.assert_close(total, per_sample.sum(0))
    assert (w2.grad[:, ~hidden.mask] == 0).all()


def test_kept_layer_norm_equals_the_norm_of_what_is_kept():
    x, w, b, residual = double(2, 5, 24), double(24), double(24), double(2, 5, 24)
    keep = Kept.from_mask(torch.arange(24) % 3 > 0)
    y, total = functional.kept_layer_norm(x, w, b, keep, residual=residual)
    m = keep.mask
    expected = F.layer_norm((x + residual)[..., m], (16,), w[m], b[m], 1e-6)
    torch.testing.assert_close(y[..., m], expected)
    assert torch.equal(total, x + residual) and (y[..., ~m] == 0).all()


def test_norm_scores_equal_the_readers_columns():
    x, w, b, reader = double(2, 5, 8), double(8), double(8), double(12, 8).requires_grad_()
    scores = torch.zeros(8, dtype=torch.float64)
    y = functional.kept_layer_norm(x, w.requires_grad_(), b, scores=scores)
    F.linear(y, reader).square().sum().backward()
    torch.testing.assert_close(scores, (reader * reader.grad).sum(0))


def test_a_missing_bias_and_mixed_dtypes_are_taken():
    x, w = torch.randn(2, 5, 8), torch.randn(8)
    y, total = functional.kept_layer_norm(x.bfloat16(), w, None, residual=x)
    assert y.dtype == total.dtype == torch.float32
    torch.testing.assert_close(y, F.layer_norm(x.bfloat16() + x, (8,), w, None, 1e-6))


def test_autocast_reaches_attention_and_mlp():
    q, x = torch.randn(1, 2, 4, 8), torch.randn(1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.attention(q, q, q, 0.3).dtype == torch.bfloat16
        assert functional.mlp(x, torch.randn(16, 8), None, torch.randn(8, 16), None).dtype == torch.bfloat16


def test_cpu_tensors_take_the_reference():
    x = torch.ones(1, 1, 8, 8)
    assert not functional.attention_takes(x, 8) and not functional.mlp_takes(x, 8, 8, 8)
    assert not functional.kept_layer_norm_takes(x) and not functional.group_dot_takes(x)


def test_torch_and_triton_are_enough():
    """Importing needs neither timm nor nvit."""
    code = (
        "import sys, nvit_kernels.functional, nvit_kernels.hosts.layers, nvit_kernels.aot; "
        "assert not {'timm', 'nvit', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
