"""The benchmark runs and says what it promises; not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WAYS = {"memcpy", "tcp", "gloo", "link", "link scattered", "link+handshake", "in-process link"}


def test_transfer_prints_its_figures_as_one_json_line():
    command = [sys.executable, str(ROOT / "recipes" / "bench.py"), "transfer"]
    command += ["--megabytes", "1", "--rounds", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bench"] == "transfer"
    assert result["rounds"] == 1
    assert {"cpu", "cores", "torch", "date", "load"} <= set(result["machine"])
    assert set(result["cpu_share"]) == {"encode", "language", "others"}
    [size] = result["sizes"]
    assert (size["megabytes"], size["rows"], size["bytes"]) == (1, 64, 64 * (16384 + 16) + 64)
    assert set(size["ms"]) == set(size["gb_s"]) == WAYS
    for spread in [*size["ms"].values(), *size["gb_s"].values()]:
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert min(size[name] for name in ("link_of_gloo", "scattered_of_gloo", "link_of_tcp", "first_token_ms")) > 0
    counts = {row["rows"]: row for row in result["bytes"]}
    assert list(counts) == [1, 16, 256, 1024]
    for rows, row in counts.items():
        assert row["least_bytes"] == rows * 16384
        assert row["payload_bytes"] == rows * 16400 + 64
        assert row["ratio"] == row["payload_bytes"] / row["least_bytes"]
    assert counts[1024]["ratio_with_frames"] <= 1.01
    assert counts[1]["ratio"] <= 1.01
