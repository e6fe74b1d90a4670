"""The reward models that people use: export, rank, and compare with each model's reference.

`python -m benchmarks.reward_models` prints the table, `--only NAME` the rows whose model or head contains NAME.
The checkpoints are small and random, of the real architecture; they go through `bonnx export` and `bonnx.load`.
"""
