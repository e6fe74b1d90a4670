"""Verify an export: the graphs' outputs against PyTorch, and the selections of reduced precision against float32."""
