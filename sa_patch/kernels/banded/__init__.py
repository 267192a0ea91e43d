"""Backend `banded`: pure torch on any device, O(n w) time, O(n) memory, differentiable."""
