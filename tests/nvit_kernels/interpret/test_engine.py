"""The engine's own layers and scores through the kernels, against its plain path."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from nvit import adapters, functional, masks, saliency


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
    yield model, groups, torch.randn(2, 3, 16, 16)
    functional.use_kernels(True)


def gradients(model, images, kernels):
    functional.use_kernels(kernels)
    model.zero_grad()
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


def test_scores_agree(pruned):
    model, groups, images = pruned
    _, grads = gradients(model, images, False)
    params = dict(model.named_parameters())
    for slices in (lambda g: g.scored_slices, lambda g: g.published_slices):
        functional.use_kernels(False)
        plain = saliency.gate_gradients(groups, params, grads, slices)
        functional.use_kernels(True)
        assert functional.group_dot(params, grads, [("head.bias", 0, None, (5,), 0, 0)]) is not None
        for name, fused in saliency.gate_gradients(groups, params, grads, slices).items():
            torch.testing.assert_close(fused, plain[name], rtol=1e-4, atol=1e-6)
