"""PyTorch modules and ONNX functions that make up the graphs score, rank, generate, prefill and decode."""
