"""Best-of-N with candidates from any generator."""
