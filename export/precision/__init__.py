"""Weights of 16, 8 and 4 bits, in PyTorch and as products of the graphs."""
