"""Benchmark of whole models: how long a prompt takes to read, stock and patched."""
