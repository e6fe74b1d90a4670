"""The small trained model that is included: puzzles, training recipe, weights and report."""

from pathlib import Path

__all__ = ["CHECKPOINT"]

CHECKPOINT = Path(__file__).parent
