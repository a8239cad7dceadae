"""Out of PyTorch's eager mode: a compact model as a file of another runtime, and its latency there."""
