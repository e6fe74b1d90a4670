"""Files of prompts and candidates."""
