"""Tiny models of every family: each module here has `HOSTS`, name -> a function that makes one with random weights, not
prepared, fp32, in eval mode. `test_families.py` holds them to what every family promises."""
