"""Pruning inside the training loops of others: callbacks for Lightning and for the Trainer of transformers."""
