"""Compiles for an H200 on a machine without a GPU: `python -m tools.gpu_compile.command`."""
