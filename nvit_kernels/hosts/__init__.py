"""Fused layers for timm models, and what puts them in and takes them out."""
