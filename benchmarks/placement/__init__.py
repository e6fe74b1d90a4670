"""Where ONNX Runtime would place the graphs' nodes on CUDA, without a GPU."""
