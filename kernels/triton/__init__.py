"""Packed weights on GPUs by way of Triton, for machines that cannot compile the CUDA kernels."""
