"""timm's Beit: position bias of a block's own and shared, absolute positions, LayerScale, both poolings."""

from functools import partial

from timm.models.beit import Beit

from tests.hosts import randomise_

TINY = {"img_size": (28, 42), "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}

KINDS = {
    "v1": {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1},
    "shared": {"use_shared_rel_pos_bias": True, "global_pool": "token", "depth": 3},
    "both": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True, "qkv_bias": False, "init_values": 0.1},
    "swiglu": {"swiglu_mlp": True, "scale_mlp": True, "mlp_ratio": 1.7},
}


def make(kind: str) -> Beit:
    return randomise_(Beit(**TINY | KINDS[kind])).eval()


HOSTS = {f"beit_{kind}": partial(make, kind) for kind in KINDS}
