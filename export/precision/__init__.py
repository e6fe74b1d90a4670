"""Weights and products of fewer bits."""
