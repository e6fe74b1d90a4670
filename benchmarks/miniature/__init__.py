"""Snell et al. (2024) in miniature: ways to spend test-time compute, compared on held-out Countdown puzzles."""
