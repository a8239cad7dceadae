"""A whole pruned DeiT-Ti, its real weights where NVIT_DATA has them, through the kernels and in plain torch."""

import os
from pathlib import Path

import pytest
import timm
import torch

from nvit_kernels import collect_scores_, functional, fuse, keep_
from nvit_kernels.ops.group_dot.plan import DotSlice, GroupDotPlan

BATCH, SIDE, HEADS, DIM, EMB, MLP = 2, 64, 3, 64, 192, 768


@pytest.fixture(scope="module")
def weights():
    if "NVIT_DATA" not in os.environ:
        pytest.skip("NVIT_DATA is not set: no real DeiT-Ti weights")
    from safetensors.torch import load_file

    return load_file(Path(os.environ["NVIT_DATA"]) / "deit_tiny_patch16_224.safetensors")


def deit(weights):
    model = timm.create_model("deit_tiny_patch16_224", img_size=SIDE).eval()
    tokens = 1 + (SIDE // 16) ** 2
    model.load_state_dict({**weights, "pos_embed": weights["pos_embed"][:, :tokens]})
    return model


def pruned():
    sizes = {"heads": HEADS, "qk_dim": DIM, "v_dim": DIM, "mlp": MLP}
    keeps = {f"blocks.{i}.{kind}": torch.rand(size) > 0.35 for i in range(12) for kind, size in sizes.items()}
    for i in range(12):
        keeps[f"blocks.{i}.heads"][i % HEADS] = True  # never the last one
    return {"emb": torch.rand(EMB) > 0.2, **keeps}


def step(model, x, labels):
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def score_plan(shapes):
    """Each group's sums of weight times gradient where its units leave the network, and each group's output range."""
    slices, places, end = [], {"emb": (0, EMB)}, EMB
    for i in range(12):
        at = {}
        for kind, size in (("heads", HEADS), ("qk_dim", DIM), ("v_dim", DIM), ("mlp", MLP)):
            at[kind], places[f"blocks.{i}.{kind}"], end = end, (end, size), end + size
        qkv, proj, mlp = f"blocks.{i}.attn.qkv", f"blocks.{i}.attn.proj.weight", f"blocks.{i}.mlp"
        slices += [
            DotSlice(proj, 0, None, (EMB, HEADS, DIM), 1, at["heads"]),
            DotSlice(proj, 0, None, (EMB, HEADS, DIM), 2, at["v_dim"]),
            DotSlice(f"{qkv}.weight", 0, EMB, (HEADS, DIM, EMB), 1, at["qk_dim"]),
            DotSlice(f"{qkv}.bias", 0, EMB, (HEADS, DIM), 1, at["qk_dim"]),
            DotSlice(f"{mlp}.fc2.weight", 0, None, (EMB, MLP), 1, at["mlp"]),
            DotSlice(f"{qkv}.weight", 0, None, (3 * EMB, EMB), 1, 0),
            DotSlice(f"{mlp}.fc1.weight", 0, None, (MLP, EMB), 1, 0),
        ]
    slices.append(DotSlice("head.weight", 0, None, (1000, EMB), 1, 0))
    return GroupDotPlan(slices, shapes), places


def test_gradients_and_choices_of_a_pruned_deit(weights, monkeypatch):
    x, labels, keeps = torch.randn(BATCH, 3, SIDE, SIDE), torch.tensor([1, 7]), pruned()
    model = fuse(deit(weights), keeps)
    scores = collect_scores_(model, BATCH)
    fused = step(model, x, labels)
    params = dict(model.named_parameters())
    plan, places = score_plan({name: p.shape for name, p in params.items()})
    from_weights = functional.group_dot(params, fused, plan)
    collect_scores_(model, 0)
    monkeypatch.setattr(functional, "_here", lambda _: False)
    eager = step(model, x, labels)
    eager_scores = functional.group_dot(params, eager, plan)
    for name, grad in eager.items():
        error = (fused[name] - grad).norm() / grad.norm().clamp_min(1e-12)
        assert error <= 1e-4, f"{name}: {error:.1e} of the gradient's norm"
    torch.testing.assert_close(from_weights, eager_scores, rtol=1e-3, atol=1e-5 * eager_scores.abs().max().item())
    for name, (start, size) in places.items():
        ours, theirs = scores[name].sum(0), eager_scores[start : start + size]
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
        kept = keeps[name].nonzero().squeeze(1)
        half = max(1, len(kept) // 2)
        ranked = theirs.square()[kept].sort().values
        chosen = [set(kept[s.square()[kept].topk(half).indices].tolist()) for s in (ours, theirs)]
        line = ranked[-half]
        near = {int(u) for u in kept if (theirs[u].square() - line).abs() <= 1e-3 * line}
        assert chosen[0] - near == chosen[1] - near, f"{name}: different units would be kept"


def test_fused_equals_timm_when_nothing_is_pruned(weights):
    model, x, labels = deit(weights), torch.randn(1, 3, SIDE, SIDE), torch.tensor([3])
    plain = step(model, x, labels)
    fused = step(fuse(model), x, labels)
    for name, grad in plain.items():
        assert (fused[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_masks_of_another_model_are_refused():
    model = fuse(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32))
    with pytest.raises(ValueError, match=r"no group blocks\.1\.mlp"):
        keep_(model, {"blocks.1.mlp": torch.ones(MLP, dtype=torch.bool)})
    with pytest.raises(ValueError, match="767 entries"):
        keep_(model, {"blocks.0.mlp": torch.ones(MLP - 1, dtype=torch.bool)})
