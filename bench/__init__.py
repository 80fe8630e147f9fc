"""Benchmarks: every figure that README or bench/results states comes from a command here."""
