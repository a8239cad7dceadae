"""Helpers that any room may import: files, memory, progress, reports."""
