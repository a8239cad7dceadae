"""timm's VisionTransformer: what `tests.hosts`, which has a straight-line reference of its own, does not hold."""

from functools import partial

from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import RmsNorm, SwiGLU

from tests.hosts import make

MORE = {
    "attention_pooling": {"global_pool": "map", "class_token": False},
    "attention_pooling_norm_behind": {"global_pool": "map", "fc_norm": True, "final_norm": True, "reg_tokens": 2},
    "rms_norm": {"norm_layer": RmsNorm, "pre_norm": True, "qk_norm": True, "qkv_bias": False},
    "aimv2": {
        "norm_layer": partial(RmsNorm, eps=1e-5),
        "embed_norm_layer": partial(RmsNorm, eps=1e-4),
        "mlp_layer": SwiGLU,
        "act_layer": "silu",
        "qkv_bias": False,
        "proj_bias": False,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
    "patch_norm": {"embed_norm_layer": TimmLayerNorm},
    "beit3": {"scale_attn_norm": True, "scale_mlp_norm": True, "global_pool": "avg"},
    "inner_norm_swiglu": {"scale_mlp_norm": True, "mlp_layer": SwiGLU, "act_layer": "silu"},
    "no_final_norm": {"final_norm": False, "init_values": 0.1},
    "no_final_norm_average": {"final_norm": False, "global_pool": "avg", "class_token": False},
}
HOSTS = {f"vit_{name}": partial(make, name) for name in ("deit_distilled", "qk_norm", "swiglu_packed")}
HOSTS |= {f"vit_{name}": partial(make, "plain", **more) for name, more in MORE.items()}
