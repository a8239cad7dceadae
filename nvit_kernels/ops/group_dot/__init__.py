"""Weight times gradient, summed by unit over a whole model."""
