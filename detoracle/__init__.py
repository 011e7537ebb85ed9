"""Test oracles and benchmarks for the label assignment and training losses of object detectors."""
