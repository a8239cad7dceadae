"""timm's VisionTransformer: a few of `tests.hosts`, which has tests of its own against a straight-line reference."""

from functools import partial

from tests.hosts import make

HOSTS = {f"vit_{name}": partial(make, name) for name in ("deit_distilled", "qk_norm", "swiglu_packed")}
