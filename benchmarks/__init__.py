"""The laboratory behind docs/performance.md: `python -m benchmarks` in a clone. It is not part of the package."""
