"""timm's SwinTransformer: windows that divide their stage, that do not, that are larger; both kinds of shift."""

from functools import partial

from timm.layers import LayerNorm as TimmLayerNorm
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from tests.hosts import randomise_

TINY = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (2, 3),
    "window_size": 4,
    "mlp_ratio": 2.0,
    "num_classes": 5,
    "weight_init": "skip",
}

VARIANTS: dict[str, dict] = {
    "shifted": {},
    "three_stages": {"depths": (1, 2, 1), "num_heads": (1, 2, 2), "window_size": 2, "embed_dim": 8},
    "padded": {"img_size": (36, 28), "window_size": (3, 4), "depths": (2, 2)},
    "windows_by_stage": {"window_size": ((2, 4), (4, 2)), "depths": (2, 2), "head_dim": (5, None), "img_size": 24},
    "always_partition": {"always_partition": True, "window_size": 5, "img_size": 16, "depths": (2, 2)},
    "max_pooling": {"global_pool": "max", "qkv_bias": False, "depths": (2,), "num_heads": (3,), "in_chans": 1},
    "double_pooling": {"global_pool": "catavgmax", "norm_layer": partial(TimmLayerNorm, eps=1e-3, bias=False)},
    "no_patch_norm": {"patch_norm": False, "mlp_ratio": (1.9, 2.3), "patch_size": 2, "img_size": (16, 20)},
}
"""Constructor arguments by kind of model, over `TINY`; `patch_norm` as Swin's own code has it."""


def make(variant: str, **more) -> nn.Module:
    kwargs = TINY | VARIANTS[variant] | more
    patch_norm = kwargs.pop("patch_norm", True)
    model = SwinTransformer(**kwargs)
    if not patch_norm:
        model.patch_embed.norm = nn.Identity()
    return randomise_(model).eval()


HOSTS = {f"swin_{name}": partial(make, name) for name in VARIANTS}
