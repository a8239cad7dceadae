"""A model in which masks would bypass something is refused by name before anything is touched."""

import re

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

import nvit
from nvit import adapters
from nvit.calibration.capture import capture
from nvit.structure.compact import compact
from nvit.structure.masks import apply_
from tests.families import eva, swin
from tests.hosts import images, labels, make, prepared, random_masks

BUNDLES = {"bundle_heads": 1, "bundle_emb": 8, "bundle_qk": 2, "bundle_v": 2, "bundle_mlp": 4}
CONFIG = nvit.PruneConfig(latency_target=(0.6,), train=False, criterion="fisher", **BUNDLES)


class OwnLinear(nn.Linear):
    """May compute anything."""


def look(module, *tensors):
    """A hook that changes nothing."""


def at(model: nn.Module, place: str) -> nn.Module:
    return model.get_submodule(place)


def lora(model):
    inject_adapter_in_model(LoraConfig(target_modules=["qkv"], init_lora_weights=False), model)


def saved_head(model):
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"], modules_to_save=["head"]), model)


@pytest.mark.filterwarnings("ignore")
def quantised(model):
    model.blocks = torch.ao.quantization.quantize_dynamic(model.blocks, {nn.Linear})


def replaced(model):
    fc1 = at(model, "blocks.1.mlp.fc1")
    model.blocks[1].mlp.fc1 = OwnLinear(fc1.in_features, fc1.out_features)


def subclassed(model):
    fc2 = at(model, "blocks.0.mlp.fc2")
    fc2.weight = nn.Parameter(TwoTensor(fc2.weight.detach(), fc2.weight.detach()), requires_grad=False)


CHANGES = {
    "lora": (lora, r"blocks.0.attn.qkv carries a LoRA adapter \(peft.tuners.lora.layer.Linear\).*merge_and_unload"),
    "modules to save": (saved_head, r"blocks.0.mlp.fc1 carries a LoRA adapter"),
    "parametrised": (
        lambda m: parametrizations.weight_norm(at(m, "blocks.0.mlp.fc2")),
        r"blocks.0.mlp.fc2 has a parametrised weight \(.*_WeightNorm\).*remove_parametrizations\(module, 'weight'\)",
    ),
    "parametrised patches": (
        lambda m: parametrizations.spectral_norm(at(m, "patch_embed.proj")),
        r"patch_embed.proj has a parametrised weight",
    ),
    "weight norm": (
        lambda m: weight_norm(at(m, "blocks.1.attn.proj")),
        r"blocks.1.attn.proj computes a weight before every call \(.*\.WeightNorm\).*remove_weight_norm\(module\)",
    ),
    "spectral norm": (lambda m: spectral_norm(at(m, "blocks.1.attn.proj")), r"SpectralNorm.*remove_spectral_norm"),
    "torch's masks": (
        lambda m: prune.l1_unstructured(at(m, "blocks.0.attn.qkv"), "weight", 0.5),
        r"blocks.0.attn.qkv computes a weight before every call .*prune.remove",
    ),
    "quantised": (quantised, r"blocks.0.attn.qkv is a torch.ao.nn.quantized.dynamic.modules.linear.Linear"),
    "another class": (replaced, r"blocks.1.mlp.fc1 is a tests.adapters.test_masking.OwnLinear"),
    "a weight of another class": (subclassed, r"blocks.0.mlp.fc2 has a weight that is a .*TwoTensor"),
    "hook": (
        lambda m: at(m, "blocks.0.attn.qkv").register_forward_hook(look),
        r"blocks.0.attn.qkv has a forward hook \(look\), which a masked model would not call; remove it first",
    ),
    "pre-hook": (lambda m: at(m, "blocks.1.mlp.fc1").register_forward_pre_hook(look), r"fc1 has a forward pre-hook"),
    "backward hook": (
        lambda m: at(m, "blocks.1.mlp.fc2").register_full_backward_hook(look),
        r"fc2 has a backward hook",
    ),
    "backward pre-hook": (
        lambda m: at(m, "blocks.1.attn.proj").register_full_backward_pre_hook(look),
        r"proj has a backward pre-hook",
    ),
    "a forward of its own": (
        lambda m: add_hook_to_module(at(m, "blocks.0.mlp.fc1"), ModelHook()),
        r"blocks.0.mlp.fc1 has a forward of its own \(",
    ),
}
"""What a user did to a model, and what is said of it."""


def host(kind: str) -> nn.Module:
    if kind == "host":
        return make("plain")
    model, groups = prepared("plain")
    return compact(model, groups, random_masks(groups, 0.7))


def state(model: nn.Module) -> tuple[dict[str, torch.Tensor], list]:
    """Copies of all weights, and what every module is."""
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    copies = {name: (t.dequantize() if t.is_quantized else t).detach().clone() for name, t in tensors.items()}
    return copies, [(name, type(m)) for name, m in model.named_modules()]


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["host", "compact"])
def test_what_masks_would_bypass_is_refused_and_the_model_is_untouched(kind, change):
    model = host(kind)
    table = nvit.LatencyTable.analytic(model, CONFIG.bundle_sizes)
    change, message = CHANGES[change]
    change(model)
    (before, modules), data = state(model), [(images(make("plain"), 4), labels(model, 4))]
    for attempt in (lambda: nvit.prune(model, data, CONFIG, table), lambda: nvit.Pruner(model, table, CONFIG)):
        with pytest.raises(ValueError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    after, modules_after = state(model)
    assert modules == modules_after and before.keys() == after.keys()
    for name, t in before.items():
        assert bool((t == after[name]).all()), name


@pytest.mark.parametrize("kind", ["host", "compact"])
def test_a_peft_model_is_refused_by_what_it_wraps(kind):
    wrapped = get_peft_model(host(kind), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(ValueError, match=re.escape("blocks.0.mlp.fc1 carries a LoRA adapter (peft.tuners.lora")):
        nvit.prune(wrapped, [])
    merged = wrapped.merge_and_unload()
    assert adapters.find_maskable(merged).groups


SWAPPED = {
    "plain": ("blocks.0.norm1", "blocks.0.attn", "blocks.1.mlp", "blocks.0.attn.attn_drop", "norm", "head", "norm_pre"),
    "swin": ("layers.1.downsample.reduction", "layers.1.downsample.norm", "layers.0.blocks.1.attn", "head.fc"),
    "eva": ("blocks.1", "blocks.0.attn.qkv", "norm_pre"),
}
"""What preparing a host replaces."""
STAYS = {
    "plain": ("", "blocks", "blocks.0", "blocks.0.drop_path1", "patch_embed", "patch_embed.proj", "pos_drop"),
    "swin": ("", "layers.1", "layers.1.downsample", "layers.0.blocks.1", "head", "patch_embed.proj"),
    "eva": ("", "patch_embed", "pos_drop"),
}
MAKE = {"plain": lambda: make("plain"), "swin": swin.HOSTS["swin_shifted"], "eva": eva.HOSTS["eva_giant"]}


@pytest.mark.parametrize("name,place", [(n, p) for n, places in SWAPPED.items() for p in places])
def test_a_hook_on_what_preparing_replaces_is_refused(name, place):
    model = MAKE[name]()
    handle = at(model, place).register_forward_hook(look)
    before = state(model)[1]
    with pytest.raises(ValueError, match=rf"^{place} has a forward hook \(look\)"):
        adapters.find_maskable(model)
    assert state(model)[1] == before
    handle.remove()
    adapters.find_maskable(model)


@pytest.mark.parametrize("name", STAYS)
def test_hooks_on_what_stays_are_fine_and_fire_in_the_masked_model(name):
    model, called = MAKE[name](), []
    for place in STAYS[name]:
        at(model, place).register_forward_pre_hook(lambda module, args, place=place: called.append(place))
    adapter = adapters.find_maskable(model)
    groups = adapter.groups(adapter.prepare(model))
    adapters.find_maskable(model)
    apply_(model, groups, random_masks(groups, 0.6))
    model(torch.randn(2, *adapter.preprocess(model)["input_size"]))
    assert set(called) == set(STAYS[name])


def test_captures_of_our_own_are_no_hooks():
    model, _ = prepared("plain")
    places = [("head", "in"), ("head", "end"), ("blocks.0.attn", "in"), ("blocks.0.mlp", "end")]
    with capture(model, places, lambda *seen: None):
        adapters.find_maskable(model)


def test_an_unknown_model_is_told_so():
    with pytest.raises(ValueError, match="no adapter knows its class"):
        adapters.find_maskable(nn.Sequential(OwnLinear(2, 2)))
