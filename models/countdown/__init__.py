"""The small trained model that ships: puzzles, recipe, weights and report."""

from pathlib import Path

__all__ = ["CHECKPOINT"]

CHECKPOINT = Path(__file__).parent
