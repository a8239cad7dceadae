"""Who watches a layer watches that one alone."""

import copy

import torch

from nvit.calibration.capture import capture
from nvit.layers import prunable_layers
from tests.hosts import images, prepared


def test_a_copy_of_a_layer_under_observation_is_not_under_observation():
    """Or the twin of a model in shards, and its moving average, would go on reporting to whoever watched the model."""
    model, _ = prepared("plain")
    x, seen, fired = images(model), [], []
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: fired.append(module))
    places = [("blocks.0.attn", "in"), ("blocks.0.attn", "out"), ("blocks.1.mlp", "end"), ("blocks.1.norm1", "emb")]
    with capture(model, places, lambda place, act, grad: seen.append(place), gradients=False):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        assert sorted(seen) == sorted(places)
        assert fired == [twin.blocks[0].attn, model.blocks[0].attn], "other people's hooks are copied"
    assert not any(layer._watches for layer in prunable_layers(twin).values())
    model(x)
    assert sorted(seen) == sorted(places)
