"""Completions from a server that speaks OpenAI's protocol."""
