"""timm's Eva at three image sizes: every kind of block, rotary embedding and pooling that its entrypoints have."""

from functools import partial

from timm.layers import LayerNorm, RmsNorm
from timm.models.eva import Eva

from tests.hosts import randomise_

TINY = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
ROTARY = {"use_rot_pos_emb": True, "ref_feat_shape": (3, 3)}
EVA02 = ROTARY | {"swiglu_mlp": True, "mlp_ratio": 4 * 2 / 3}
SCALED = {"init_values": 1e-2}
DINOV3 = SCALED | {
    "img_size": (32, 48),
    "patch_size": 16,
    "dynamic_img_size": True,
    "num_reg_tokens": 4,
    "use_abs_pos_emb": False,
    "use_fc_norm": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
PERCEPTION = ROTARY | {
    "attn_type": "rope",
    "use_pre_transformer_norm": True,
    "rope_grid_offset": 1.0,
    "rope_grid_indexing": "xy",
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
NAVER = SCALED | {
    "attn_type": "rope",
    "global_pool": "token",
    "use_rot_pos_emb": True,
    "rope_grid_indexing": "xy",
    "use_abs_pos_emb": False,
}

KINDS = {
    "giant": {"mlp_ratio": 2.1},
    "02_tiny": EVA02,
    "02_base": EVA02 | {"qkv_fused": False, "scale_mlp": True},
    "02_clip": EVA02 | {"qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"},
    "reg_gap": SCALED | ROTARY | {"class_token": False, "num_reg_tokens": 1, "use_abs_pos_emb": False},
    "reg_gap_no_bias": SCALED | ROTARY | {"class_token": False, "num_reg_tokens": 2, "qkv_bias": False},
    "dinov3": DINOV3 | {"qkv_bias": False},
    "dinov3_plus": DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8},
    "sapiens2": DINOV3
    | {
        "attn_type": "rope",
        "qkv_fused": False,
        "qk_norm": True,
        "swiglu_mlp": True,
        "attn_only_layer_scale": True,
        "rope_rescale_coords": 2.0,
        "global_pool": "token",
        "norm_layer": partial(RmsNorm, eps=1e-6),
    },
    "perception_core": PERCEPTION | {"global_pool": "map", "attn_pool_num_heads": 4, "attn_pool_mlp_ratio": 2.0},
    "perception_lang": PERCEPTION
    | SCALED
    | {"class_token": False, "use_post_transformer_norm": False, "use_fc_norm": False},
    "rope_axial": NAVER | {"rope_temperature": 100.0},
    "rope_mixed": NAVER | {"rope_type": "mixed", "rope_temperature": 10.0, "depth": 3},
    "rope_mixed_ape": NAVER | {"rope_type": "mixed", "use_abs_pos_emb": True, "no_embed_class": True},
    "mrope": ROTARY | {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3), "qk_norm": True},
}


def make(kind: str) -> Eva:
    return randomise_(Eva(**TINY | KINDS[kind])).eval()


HOSTS = {f"eva_{kind}": partial(make, kind) for kind in KINDS}
