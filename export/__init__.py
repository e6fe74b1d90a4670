"""A network becomes an artifact: trace, append the selection, verify, write."""
