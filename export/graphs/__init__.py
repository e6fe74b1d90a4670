"""PyTorch modules and ONNX functions that become the graphs score, rank, generate, prefill and decode."""
