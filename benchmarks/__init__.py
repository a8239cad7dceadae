"""Honest timings of every kernel beside its peers. Nothing imports these."""
