"""Scoring candidates after a prompt."""
