"""16-, 8- and 4-bit weights, in PyTorch and in the graphs' matrix products."""
