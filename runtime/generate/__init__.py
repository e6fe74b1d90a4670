"""Sampling candidates: options, one run of one graph, and the loop on the host."""
