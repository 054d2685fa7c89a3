"""Measurements against named peers, run by hand: `python -m benchmarks.<name>`. None of them is a test, and no test times anything."""
