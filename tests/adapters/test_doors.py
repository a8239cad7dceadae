"""Models that nvit does not take as they come: which it is, and the way in."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from nvit import adapters
from tests.families import HOSTS
from tests.hosts import make


def distributed(model):
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


def with_adapters(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], r=2))


class Detector(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.boxes = encoder, nn.Linear(7, 4)


class Mine(VisionTransformer):
    pass


def mine(model):
    return Mine(img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3)


DOORS = {
    "DataParallel": (nn.DataParallel, r"DataParallel is not .*holds a VisionTransformer; give nvit model\.module inst"),
    "DDP": (distributed, r"DistributedDataParallel is not .*give nvit model\.module instead \(under torchrun"),
    "compiled": (torch.compile, r"OptimizedModule is not .*give nvit model\._orig_mod instead \(compile the pruned"),
    "PEFT": (with_adapters, r"holds a VisionTransformer with adapters; give nvit model\.merge_and_unload\(\) instead"),
    "inside another": (Detector, r"Detector is not .*give nvit model\.encoder instead \(put the pruned one back"),
    "inside a list": (lambda m: Detector(nn.ModuleList([m])), r"give nvit model\.encoder\.0 instead"),
    "a subclass": (mine, r"Mine is not .*: it is a subclass of VisionTransformer, which may compute something else"),
    "torchvision": (
        lambda m: torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32),
        r"^torchvision\.models\.vision_transformer\.VisionTransformer is not .*: it is torchvision's; take the timm",
    ),
    "a convolutional net": (
        lambda m: timm.create_model("resnet18"),
        r"no adapter knows its class\. Supported families",
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_the_way_in_is_named(door):
    wrap, says = DOORS[door]
    model = wrap(make("plain"))
    with pytest.raises(ValueError, match=says) as e:
        adapters.find(model)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("door", ["DataParallel", "compiled", "inside another"])
def test_the_way_in_leads_there(door):
    inside = {"DataParallel": "module", "compiled": "_orig_mod", "inside another": "encoder"}[door]
    model = getattr(DOORS[door][0](make("plain")), inside)
    adapters.find(model).prepare(model)


def share_a_block(model):
    model.blocks[1] = model.blocks[0]


def share_a_weight(model):
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


@pytest.mark.parametrize("host", ["vit_qk_norm", "eva_rope_mixed", "beit_both"])
@pytest.mark.parametrize("tie", [share_a_block, share_a_weight])
def test_tied_blocks_are_refused(host, tie):
    model = HOSTS[host]()
    tie(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.\S+ is the same parameter as blocks\.0\.\S+ \(tied\)"):
        adapters.find(model)
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    adapters.find(model).prepare(model)


def conv_stem(embed):
    embed.proj = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 4, 4))


def overlapping(embed):
    embed.proj = nn.Conv2d(3, 48, 12, 8, 2)


def grouped(embed):
    embed.proj = nn.Conv2d(3, 48, 8, 8, groups=3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (conv_stem, r"a stem of Sequential \(Conv2d, ReLU, Conv2d\) where one convolution was expected"),
        (overlapping, r"a convolutional stem \(kernel \(12, 12\), stride \(8, 8\)\); patches have to lie side by side"),
        (grouped, "a convolutional stem"),
    ],
)
def test_convolutional_stems_are_refused(change, says):
    model = make("plain")
    change(model.patch_embed)
    with pytest.raises(ValueError, match=says):
        adapters.find(model)


def test_two_dropout_rates_in_one_mlp_are_refused():
    model = make("plain")
    model.blocks[0].mlp.drop1.p = 0.5
    with pytest.raises(ValueError, match="two dropout rates in one MLP"):
        adapters.find(model)
