"""`bench.py parallel` runs, and counts the bytes that cross: hand-worked for the small checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.server import REPO

HIDDEN, CHOICES, ITEM = 128, 2, 4
ROW = (HIDDEN + 2 * CHOICES + HIDDEN) * ITEM
"""There with weights and ids, and a sum back."""


@pytest.mark.acceptance
def test_bytes_are_those_that_have_to_cross_and_padding():
    command = [sys.executable, "recipes/bench.py", "parallel", "--ranks", "1", "2", "--rounds", "1", "--scenes", "1"]
    done = subprocess.run([*command, "--json"], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    steps = {(entry["step"], entry["ranks"], entry["kind"]): entry for entry in result["steps"]}
    assert steps["decode, 12 sequences", 1, None]["bytes"] == 0
    assert steps["agreement on a step", 2, None]["ms"] > 0
    # Both ranks send what they have, padded to a bucket, to the other one: 6 rows each in 8.
    assert steps["decode, 12 sequences", 2, "gather"]["bytes"] == pytest.approx(2 * 8 * ROW / 12)
    assert steps["chunk of 64 on one rank", 2, "gather"]["bytes"] == 2 * ROW
    tokens = {"decode, 12 sequences": 12, "chunk of 64 on one rank": 64, "prompts of 512 in all": 512}
    for name, count in tokens.items():
        entry = steps[name, 2, "all_to_all"]
        least = entry["least_bytes"]
        assert 0 < least <= 2 * HIDDEN * ITEM
        counts = 8 * 2 / count  # one int64 from each rank
        assert entry["bytes"] == pytest.approx(least / (2 * HIDDEN) * (2 * HIDDEN + 2 * CHOICES) + counts)
    loads = result["loads"]
    assert loads["tokens"] > 20
    assert loads["busiest_rank"]["1"] == 1.0
    assert all(low <= 1 <= high for low, high in zip(loads["idlest"], loads["busiest"], strict=True))
