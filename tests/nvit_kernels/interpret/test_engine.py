"""The engine's own layers and scores through the kernels, against its plain path."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from nvit import adapters
from nvit.criteria import gates
from nvit.layers import Attention, functional
from nvit.structure import masks


@pytest.fixture
def pruned():
    """A masked model: one head of four, half the QK dims and a quarter of the hidden units and channels gone."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=5).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    left = {"emb": 0.75, "heads": 0.75, "qk_dim": 0.5, "v_dim": 1.0, "mlp": 0.75}
    masks.apply_(model, groups, {g.name: torch.arange(g.size) < left[g.kind] * g.size for g in groups})
    return model, groups, torch.randn(2, 3, 16, 16)


def gradients(model, images, kernels):
    model.zero_grad()
    with functional.kernels(kernels):
        logits = model(images)
        logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def test_outputs_and_gradients_agree(pruned):
    model, _, images = pruned
    (plain, theirs), (fused, ours) = gradients(model, images, False), gradients(model, images, True)
    assert not torch.equal(plain, fused), "the kernels did not run"
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    for name, exact in theirs.items():
        assert float((ours[name] - exact).norm()) <= 1e-4 * float(exact.norm()) + 1e-12, name


class Biased(torch.nn.Module):
    """A host with a bias for every pair of places in a row of tokens."""

    def __init__(self, heads, dim, tokens):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(24, 3 * heads * dim), torch.nn.Linear(heads * dim, 24)
        self.table = torch.nn.Parameter(torch.randn(2 * tokens - 1, heads))


MASKS = {
    "none": (lambda: None, True),
    "windows": (lambda: -100.0 * (torch.rand(2, 1, 9, 9) < 0.4), True),
    "windows of every image": (lambda: -100.0 * (torch.rand(2, 1, 9, 9) < 0.4).repeat(2, 1, 1, 1), True),
    "heads": (lambda: torch.randn(3, 9, 9), True),
    "boolean": (lambda: torch.rand(4, 1, 9, 9) < 0.7, False),
    "of each image and head": (lambda: torch.randn(4, 3, 9, 9), False),
    "learned": (lambda: torch.randn(2, 1, 9, 9, requires_grad=True), False),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_with_a_position_bias_agrees(name, monkeypatch):
    """And runs fused for a mask of windows or heads, whichever way an adapter passes it."""
    from nvit_kernels import functional as kernels

    torch.manual_seed(0)
    made, fused = MASKS[name]
    places = torch.arange(9)
    layer = Attention(Biased(3, 8, 9), heads=3, qk_dim=8, v_dim=8, scale=0.3, bias_table="table",
                      bias_index=places.unsqueeze(1) - places + 8)  # fmt: skip
    layer.keep_({"emb": torch.ones(24, dtype=torch.bool), "heads": torch.ones(3, dtype=torch.bool),
                 "qk_dim": torch.ones(8, dtype=torch.bool), "v_dim": torch.ones(8, dtype=torch.bool)})  # fmt: skip
    x, mask, calls, run = torch.randn(4, 9, 24), made(), [], kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *a, **k: calls.append(1) or run(*a, **k))
    results = []
    for on in (False, True):
        layer.zero_grad()
        with functional.kernels(on):
            out = layer.attend(x, mask, windows=2)
            out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
    assert len(calls) == fused
    for plain, ours in zip(*results, strict=True):
        assert float((ours - plain).norm()) <= 1e-5 * float(plain.norm())


def test_scores_agree(pruned):
    model, groups, images = pruned
    _, grads = gradients(model, images, False)
    params = dict(model.named_parameters())
    for slices in (lambda g: g.scored_slices, lambda g: g.published_slices):
        with functional.kernels(False):
            plain = gates.gate_gradients(groups, params, grads, slices)
        assert functional.group_dot(params, grads, [("head.bias", 0, None, (5,), 0, 0)]) is not None
        for name, fused in gates.gate_gradients(groups, params, grads, slices).items():
            torch.testing.assert_close(fused, plain[name], rtol=1e-4, atol=1e-6)
