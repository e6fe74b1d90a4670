"""Snell et al. (2024) in miniature: methods of using test-time compute, compared on held-out Countdown puzzles."""
