"""Which blocks of keys each query chooses, in Triton kernels: of all eligible ones, or by a tree."""
