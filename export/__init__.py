"""Export a network as an artifact: trace, append the selection, verify, write."""
