"""Benchmarks behind `diffsmooth bench`."""
