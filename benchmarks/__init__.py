"""Timings of funcbayes beside plain loops and other libraries: `python -m benchmarks`."""
