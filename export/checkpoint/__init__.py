"""Read what is exported: the network, its scoring rule, its limits, and how text becomes its tokens."""
