"""What losing a unit costs: one idea a file, one registry."""
