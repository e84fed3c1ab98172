"""The steps of `tools/gpu_check.py`, each a process of its own."""
