"""One folder an op: its kernels, its launches and gradients (op.py), its definition in plain torch (reference.py)."""
