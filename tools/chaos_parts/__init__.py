"""What `tools/chaos.py` is made of: schedule, verdicts and slopes are pure; `ordeal.run` is the way in."""
