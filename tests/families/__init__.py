"""Tiny models of every family: each module here has `HOSTS`, name -> a function that makes one with random weights, not
prepared, fp32, in eval mode. `tests/adapters/test_families.py` holds them to what every family promises."""

import importlib
import pkgutil

_MODULES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
HOSTS = {name: make for module in _MODULES for name, make in module.HOSTS.items()}
"""Of all families."""

ONE_OF_EACH = [
    name
    for name in ("vit_deit_distilled", "swin_three_stages", "eva_rope_mixed", "beit_both", "hf_dinov2_registers")
    if name in HOSTS
]
"""One of each family, for what need not be shown of every kind of model."""
