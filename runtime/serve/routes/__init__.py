"""One module for each endpoint: its request, and what answers it."""
