"""Pruned models in transformers, under the name that users import: it gives them a place among the Auto classes."""

from .integrations.hf_models import CLASSES, pretrained, save_pretrained

__all__ = ["CLASSES", "pretrained", "save_pretrained"]
