"""Timings against other implementations, as ratios; each program runs as `python -m benchmarks.NAME [--json FILE]`."""
