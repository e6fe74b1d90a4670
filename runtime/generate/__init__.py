"""Sampling candidates: options, one run of one graph, and the loop that the host steers."""
