"""A compact model of every family compiles into one graph that computes what it does."""

import pytest
import torch

from nvit import adapters
from nvit.structure.compact import compact
from nvit.utils.modes import compiled
from tests.families import HOSTS, ONE_OF_EACH
from tests.hosts import random_masks


def small_and_images(host: str):
    model = HOSTS[host]()
    adapter = adapters.find(model)
    groups = adapter.groups(adapter.prepare(model))
    images = torch.randn(2, *adapter.preprocess(model)["input_size"], generator=torch.Generator().manual_seed(0))
    return compact(model, groups, random_masks(groups)).eval(), images


@pytest.mark.parametrize("host", [*ONE_OF_EACH, "eva_perception_core", "swin_padded"])
def test_a_compact_model_compiles_without_a_break(host):
    """`fullgraph=True` raises at a break. Traced and differentiated ahead of time as inductor would have it."""
    model, images = small_and_images(host)
    fast = compiled(lambda x: adapters.of(model).logits(model, x), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(images), adapters.of(model).logits(model, images))


def test_a_compact_model_trains_compiled_with_the_same_gradients():
    model, images = small_and_images(ONE_OF_EACH[0])
    fast = compiled(lambda x: adapters.of(model).logits(model, x).mean, backend="aot_eager")
    found = []
    for function in (fast, lambda x: adapters.of(model).logits(model, x).mean):
        function(images).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    for name, grad in found[1].items():
        torch.testing.assert_close(found[0][name], grad, msg=name)


def test_inductors_code_computes_what_the_model_does():
    model, images = small_and_images("vit_deit_distilled")
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(images), model(images), rtol=1e-4, atol=1e-5)
