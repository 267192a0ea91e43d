"""Backend `triton`: fused forward kernels on CUDA GPUs, tested on CPUs in Triton's interpreter."""
