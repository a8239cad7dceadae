"""Products with one kept width, under mlp and swiglu."""
