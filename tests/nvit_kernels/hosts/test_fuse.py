import copy

import pytest
import timm
import torch
from torch import nn

from nvit_kernels import collect_scores_, fuse, keep_, unfuse
from nvit_kernels.hosts import layers
from nvit_kernels.hosts.fuse import fused_layers, groups

HOSTS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale, norm before": ("vit_tiny_patch16_224", dict(init_values=0.1, pre_norm=True)),
    "qk norm": ("vit_tiny_patch16_224", dict(qk_norm=True)),
    "swiglu": ("vit_tiny_patch16_224", dict(mlp_layer=timm.layers.SwiGLU, act_layer=nn.SiLU)),
    "packed swiglu": ("vit_tiny_patch16_224", dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU)),
    "drop path": ("vit_tiny_patch16_224", dict(drop_path_rate=0.1)),
}


def host(name):
    torch.manual_seed(0)
    model, options = HOSTS[name]
    return timm.create_model(model, depth=2, img_size=32, embed_dim=48, num_heads=3, num_classes=5, **options).eval()


@pytest.mark.parametrize("name", HOSTS)
def test_fuse_and_unfuse_change_no_output_and_no_parameter(name):
    model, x = host(name), torch.randn(2, 3, 32, 32)
    expected, keys = model(x), list(model.state_dict())
    parameters = {n: id(p) for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    assert fuse(model) is model and len(fused_layers(model)) >= 2 * 4
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys and {n: id(p) for n, p in model.named_parameters()} == parameters
    assert unfuse(model) is model and [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), expected) and list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


def test_training_between_fuse_and_unfuse_stays():
    model, x = fuse(host("vit")).train(), torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    trained = model.eval()(x)
    plain = unfuse(model.train())
    assert plain.training and all(m.training for m in plain.modules())
    torch.testing.assert_close(plain.eval()(x), trained)


def sliced(model, heads, mlp):
    """The same model with pruned heads and hidden units cut out of timm's own modules."""
    model = copy.deepcopy(model)
    for block, keep_heads, keep_mlp in zip(model.blocks, heads, mlp, strict=True):
        attn, rows = block.attn, keep_heads.repeat_interleave(block.attn.head_dim)
        attn.num_heads, attn.attn_dim = int(keep_heads.sum()), int(rows.sum())
        attn.qkv.weight = nn.Parameter(attn.qkv.weight[rows.repeat(3)])
        attn.qkv.bias = nn.Parameter(attn.qkv.bias[rows.repeat(3)])
        attn.proj.weight = nn.Parameter(attn.proj.weight[:, rows])
        block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight[keep_mlp])
        block.mlp.fc1.bias = nn.Parameter(block.mlp.fc1.bias[keep_mlp])
        block.mlp.fc2.weight = nn.Parameter(block.mlp.fc2.weight[:, keep_mlp])
    return model


def test_masked_equals_compact_and_a_compact_model_fuses_too():
    model, x = host("vit"), torch.randn(2, 3, 32, 32)
    heads = [torch.tensor([True, False, True]), torch.tensor([False, False, True])]
    mlp = [torch.rand(192) > 0.5 for _ in range(2)]
    compact = sliced(model, heads, mlp)
    expected = compact(x)
    masks = {f"blocks.{i}.heads": heads[i] for i in range(2)} | {f"blocks.{i}.mlp": mlp[i] for i in range(2)}
    masked = fuse(copy.deepcopy(model), masks)
    torch.testing.assert_close(masked(x), expected)
    torch.testing.assert_close(fuse(compact)(x), expected)
    keep_(masked, {name: torch.ones_like(mask) for name, mask in masks.items()})
    torch.testing.assert_close(masked(x), model(x))


def test_pruned_channels_of_the_stream_count_for_nothing():
    model, x, emb = host("vit"), torch.randn(2, 3, 32, 32), torch.arange(48) % 4 > 0
    masked = fuse(copy.deepcopy(model), {"emb": emb})
    expected = masked(x)
    for block in masked.blocks:  # whatever writes to pruned channels, or reads them, changes nothing
        for linear in (block.attn.proj, block.mlp.fc2):
            linear.weight.data[~emb] = 9.0
        for linear in (block.attn.qkv, block.mlp.fc1):
            linear.weight.data[:, ~emb] = 9.0
    torch.testing.assert_close(masked(x), expected)


def test_scores_come_out_of_a_backward_by_group_and_sample():
    model, x = fuse(host("vit")), torch.randn(4, 3, 32, 32)
    scores = collect_scores_(model, 4)
    assert set(scores) == set(groups(model)) and scores["blocks.1.mlp"].shape == (4, 192)
    model(x).square().sum().backward()
    fc2 = model.blocks[1].mlp.fc2.weight
    torch.testing.assert_close(scores["blocks.1.mlp"].sum(0), (fc2 * fc2.grad).sum(0), rtol=1e-3, atol=1e-5)
    readers = [m.weight for b in model.blocks for m in (b.attn.qkv, b.mlp.fc1)] + [model.head.weight]
    by_weight = sum((w * w.grad).sum(0) for w in readers)
    torch.testing.assert_close(scores["emb"].sum(0), by_weight, rtol=1e-3, atol=1e-4)
    assert collect_scores_(model, 0) == {}
    before = scores["emb"].clone()
    model(x).sum().backward()
    assert torch.equal(scores["emb"], before)


@pytest.mark.parametrize("options", [dict(attn_drop_rate=0.1), dict(proj_drop_rate=0.1), dict(act_layer=nn.ReLU)])
def test_what_the_kernels_cannot_compute_stays_timms(options):
    model = fuse(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, **options))
    stays = "attn" if "attn_drop_rate" in options else "mlp"
    assert not isinstance(getattr(model.blocks[0], stays), layers.Fused)
    assert isinstance(model.blocks[0].norm1, layers.LayerNorm)


def test_attention_masks_are_refused():
    block = fuse(timm.models.vision_transformer.Block(24, 3))
    with pytest.raises(ValueError, match="unfuse"):
        block(torch.randn(1, 4, 24), attn_mask=torch.zeros(4, 4))


def test_a_lone_block_is_swapped_and_given_back():
    block = timm.models.vision_transformer.Block(24, 3)
    fused = fuse(block)
    assert isinstance(fused, layers.Block) and fuse(fused) is fused and unfuse(fused) is block
