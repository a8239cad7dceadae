"""Where nothing is masked a layer calls its linear modules: what wraps, hooks or quantises them takes effect."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from nvit import LatencyTable, PruneConfig, adapters, prune
from nvit.layers.projection import Projection, as_tensors
from nvit.structure.compact import compact
from tests.families import beit, eva, hf, swin
from tests.hosts import images, labels, make, prepared, random_masks

HOSTS = {name: partial(make, name) for name in ("deit_distilled", "qk_norm", "swiglu", "swiglu_packed")}
HOSTS |= {"map_pooling": partial(make, "plain", global_pool="map", class_token=False)}
HOSTS |= {name: swin.HOSTS[name] for name in ("swin_shifted",)}
HOSTS |= {name: eva.HOSTS[name] for name in ("eva_giant", "eva_02_clip", "eva_02_tiny")}
HOSTS |= {name: beit.HOSTS[name] for name in ("beit_v1", "beit_both", "beit_swiglu")}
HOSTS |= {name: hf.HOSTS[name] for name in ("hf_deit_teacher", "hf_dinov2_swiglu") if hf.HERE}


def small(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A compact model in fp64, and two images."""
    host = HOSTS[name]().double()
    adapter = adapters.find(host)
    x = torch.randn(2, *adapter.preprocess(host)["input_size"], dtype=torch.float64)
    groups = adapter.groups(adapter.prepare(host))
    return compact(host, groups, random_masks(groups, 0.6)).eval(), x


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([t for t in adapters.find(model).logits(model, x) if t is not None], -1)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def lora(names) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, target_modules=list(names), init_lora_weights=False)


@pytest.fixture
def twins():
    """A compact model, and timm's own of the same widths with its weights: 3 heads of 12 dims on 36 channels."""
    model, groups = prepared("plain", torch.float64)
    left = {"emb": 36, "heads": 3, "qk_dim": 12, "v_dim": 12, "mlp": 60}
    cut = compact(model, groups, {g.name: torch.arange(g.size) < left[g.kind] for g in groups}).eval()
    plain = make("plain", torch.float64, embed_dim=36, mlp_ratio=60 / 36)
    plain.load_state_dict(cut.state_dict())
    for block in plain.blocks:
        block.attn.scale, block.attn.fused_attn = 16**-0.5, False  # the dense model's scale
    torch.testing.assert_close(cut(images(cut)), plain(images(cut)), rtol=0, atol=1e-12)
    return cut, plain


def test_lora_changes_a_compact_model_as_it_does_a_plain_twin_and_so_do_its_gradients(twins):
    x = images(twins[0])
    before = twins[0](x).detach()
    ours, theirs = (get_peft_model(m, lora(["qkv", "attn.proj", "fc1", "fc2", "head"])) for m in twins)
    theirs.load_state_dict(ours.state_dict())
    assert not torch.allclose(ours(x), before, atol=0.01)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
    for model in (ours, theirs):
        F.cross_entropy(model(x), labels(twins[1], len(x))).backward()
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(found) == 2 * (4 * 2 + 1) and all("lora_" in n for n in found)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            assert bool(p.grad.any()), name
            torch.testing.assert_close(found[name], p.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", HOSTS)
def test_lora_on_every_linear_layer_of_every_family_is_its_merged_weight(name):
    model, x = small(name)
    before, found = logits(model, x).detach(), linears(model)
    ours = inject_adapter_in_model(lora(found), copy.deepcopy(model))
    with torch.no_grad():
        for part, linear in found.items():
            wrapped = ours.get_submodule(part)
            linear.weight += wrapped.get_delta_weight("default")
    assert not torch.allclose(logits(ours, x), before, atol=1e-3)
    torch.testing.assert_close(logits(ours, x), logits(model, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", HOSTS)
def test_hooks_on_linear_layers_fire_and_may_change_what_they_return(name):
    model, x = small(name)
    before, called = logits(model, x).detach(), []
    for part, linear in linears(model).items():
        linear.register_forward_pre_hook(lambda module, args, part=part: called.append(part))
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=1e-12)  # q_bias is added apart
    assert sorted(called) == sorted(linears(model))
    linear = next(m for part, m in linears(model).items() if part.endswith(("fc2", "down_proj", "weights_out")))
    linear.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(logits(model, x), before)


def test_a_merged_model_is_pruned_again(twins):
    model, _ = twins
    x = images(model)
    ours = get_peft_model(model.float(), lora(["qkv", "attn.proj", "fc1", "fc2"]))
    x = x.float()
    expected = ours(x).detach()
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5)
    bundles = {"bundle_heads": 1, "bundle_emb": 4, "bundle_qk": 2, "bundle_v": 2, "bundle_mlp": 4}
    config = PruneConfig(latency_target=(0.6,), train=False, criterion="fisher", **bundles)
    table = LatencyTable.analytic(merged, config.bundle_sizes)
    result = prune(merged, [(x, labels(merged, len(x)))], config, table)
    assert result.snapshots[0].predicted_ratio <= 0.6
    torch.testing.assert_close(result.model(x), merged(x), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_quantised_layers_of_a_compact_model_are_those_of_a_plain_twin(twins):
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import quantize_dynamic

    ours, theirs = (m.float() for m in twins)
    x = images(ours)
    before = ours(x)
    for model in (ours, theirs):
        model.blocks = quantize_dynamic(model.blocks, {nn.Linear})
    assert isinstance(ours.blocks[0].attn.qkv, Linear) and isinstance(ours.blocks[1].mlp.fc2, Linear)
    assert not torch.allclose(ours(x), before, atol=1e-3)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_a_kernel_gets_the_weights_of_plain_layers_alone():
    plain = as_tensors(nn.Linear(3, 4))
    assert plain is not None and plain.shape == (4, 3)
    masked = Projection(torch.zeros(4, 3), None, torch.tensor([0, 2]), torch.tensor([1]))
    assert as_tensors(masked) is masked and masked.shape == (2, 1) == tuple(masked.kept()[0].shape)
    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda module, args, out: out)
    replaced = nn.Linear(3, 4)
    replaced.forward = lambda x: x
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert [as_tensors(m) for m in (hooked, replaced, normed, nn.Identity())] == [None] * 4
