"""Backend `flash`: FlashAttention's kernels, whichever of its libraries is installed."""
