"""The proof: ONNX Runtime beside PyTorch, and fewer bits beside float32."""
