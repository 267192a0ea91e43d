"""Kernels compiled for cards that are not there: what they need, and what does not compile."""
