"""fc1, GELU, fc2 over kept hidden units."""
