"""Every CUDA parity check and benchmark in one command."""
