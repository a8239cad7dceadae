"""Models with a head for pixels: a class token and registers that make no map, and the last of several streams."""

from functools import partial

import torch
from torch import nn

from nvit import adapters
from tests.families import swin
from tests.hosts import make


def segmented(host) -> nn.Module:
    """With statistics of a head that was trained."""
    model = adapters.segmenter(host(), ["sky", "road", "car"]).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.randn(model.hidden, generator=g) * 0.1)
        model.norm.running_var.copy_(0.5 + torch.rand(model.hidden, generator=g))
        for p in (model.project.weight, model.classify.weight):
            p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
    return model


HOSTS = {
    "segmenter_vit": partial(segmented, partial(make, "registers", img_size=(16, 24))),
    "segmenter_swin": partial(segmented, next(iter(swin.HOSTS.values()))),
}
