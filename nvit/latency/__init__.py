"""Milliseconds by widths: the grid, the table made of it, the clock that measured it."""
