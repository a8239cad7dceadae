"""What pruning leaves of a real model's accuracy; needs the weights and images that NVIT_DATA names."""
