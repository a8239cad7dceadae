"""Which bundles leave: pure functions of scores, masks and latency table. Same input, same answer, on every rank."""
