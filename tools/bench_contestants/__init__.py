"""Who takes part in `recipes/bench.py engine`: one process each, driven over JSON lines."""
