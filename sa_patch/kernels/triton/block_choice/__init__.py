"""Triton kernels that choose blocks for each query: of all eligible ones, or coarse to fine."""
