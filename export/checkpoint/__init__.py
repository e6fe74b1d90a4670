"""Read a checkpoint for export: the network, its scoring rule and limits, and its tokenizer."""
