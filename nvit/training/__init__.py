"""Data, objective and optimisation steps, for pruning and finetuning alike."""
