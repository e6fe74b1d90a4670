"""An artifact gives answers: load, score, rank. numpy and ONNX Runtime only."""
