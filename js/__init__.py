"""The npm package `bonnx`, so that `bonnx page` finds its files where Python is installed."""
