"""What is traced and appended: one graph for each question that the runtime asks."""
