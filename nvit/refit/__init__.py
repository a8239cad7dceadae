"""What remains after pruning, refitted in closed form: no training, no labels."""
