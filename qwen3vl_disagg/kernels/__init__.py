"""Kernels that PyTorch does not have: for bfloat16 on CPUs with AVX-512 BF16 (each has its reference in `model`), and
in `gpu` on CUDA."""
