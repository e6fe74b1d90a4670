"""Prove an export: the graphs' outputs against PyTorch's, and the choices of fewer bits against float32's."""
