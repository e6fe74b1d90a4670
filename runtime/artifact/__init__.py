"""The folder that export writes: its manifest, its files, its limits."""
