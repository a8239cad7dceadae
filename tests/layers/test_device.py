"""A masked model computes where its parameters are. On a fake CUDA device, which needs no GPU, a tensor that was left
on the CPU raises."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from nvit import adapters
from nvit.layers import functional, keep_
from tests.families import beit, eva, hf, swin
from tests.hosts import make, random_masks

HOSTS = {name: partial(make, name) for name in ("plain", "deit_distilled", "clip", "swiglu")}
HOSTS |= {"map_pooling": partial(make, "plain", global_pool="map", class_token=False)}
HOSTS |= {name: swin.HOSTS[name] for name in ("swin_shifted", "swin_no_patch_norm")}
HOSTS |= {name: eva.HOSTS[name] for name in ("eva_02_clip", "eva_rope_mixed", "eva_dinov3")}
HOSTS |= {name: beit.HOSTS[name] for name in ("beit_both", "beit_swiglu")}
HOSTS |= {name: hf.HOSTS[name] for name in ("hf_deit_teacher", "hf_dinov2_swiglu") if hf.HERE}
CUDA = torch.device("cuda:0")


class ToFake(TorchFunctionMode):
    """A real tensor that is sent to the fake device arrives there; all else is real, as the masks are."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.to and CUDA in args:
            return self.send(args[0])
        return func(*args, **(kwargs or {}))

    def send(self, t: Tensor) -> Tensor:
        with self.fake:
            return self.fake.from_tensor(t).to(CUDA)


def move_(model: nn.Module, to: ToFake) -> None:
    """What `model.to("cuda")` does."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(to.send(p.detach())))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer if buffer is None else to.send(buffer))


@pytest.fixture
def without_kernels():
    """A launch needs a real device."""
    with functional.kernels(False):
        yield


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("kind", ["none", "emb", "heads", "qk_dim", "v_dim", "mlp", "every"])
@pytest.mark.parametrize("name", HOSTS)
def test_a_model_that_is_masked_on_a_device_runs_there(name, kind):
    model = HOSTS[name]()
    adapter = adapters.find(model)
    x = torch.randn(2, *adapter.preprocess(model)["input_size"])
    groups = adapter.groups(adapter.prepare(model))
    masks = random_masks(groups, 0.6)
    masks = {g.name: masks[g.name] if kind in (g.kind, "every") else torch.ones_like(masks[g.name]) for g in groups}
    expected = [t.shape for t in adapter.logits(model, x) if t is not None]
    to = ToFake(FakeTensorMode())
    move_(model, to)
    with to:
        keep_(model, masks)
    with to.fake, torch.no_grad():
        found = [t for t in adapter.logits(model, to.fake.from_tensor(x).to(CUDA)) if t is not None]
    assert [t.shape for t in found] == expected
    assert all(t.device == CUDA for t in found)
