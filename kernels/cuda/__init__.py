"""CUDA kernels. They compile once for each user and device, on first use."""
