"""ONNX Runtime: which is installed, and sessions of an artifact's graphs."""
