"""What a checkpoint says: network, scoring rule, tokenizer, text."""
