"""Benchmarks: the farm beside its peers in one run, the cost of many renderers, the cost of large plans."""
