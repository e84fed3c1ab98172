"""What `tools/places.py` is made of: drawn screens, the oracle's answers, the routes, and verdicts."""
