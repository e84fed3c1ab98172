"""The benchmark of pooling: what cannot be measured."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "recipes" / "bench.py"


@pytest.mark.parametrize("wrong", ["--rounds", "--images", "--image-side", "--threads"])
def test_wrong_numbers_are_exit_status_2(monkeypatch, capsys, wrong):
    monkeypatch.setattr(sys, "argv", ["bench.py", "pooling", wrong, "0", "--preset", "none"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(BENCH), run_name="__main__")
    assert caught.value.code == 2
    assert "error: need at least one round" in capsys.readouterr().err
