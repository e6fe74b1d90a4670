"""Choosing among scores: aggregation, votes, and the answers that votes count; the same rules as in the graphs."""
