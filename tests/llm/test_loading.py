"""What `LLM` says while it loads: nothing, unless that takes long or somebody looks on."""

from __future__ import annotations

import re
import sys

import pytest
from safetensors.torch import load_file

from qwen3vl_disagg import LLM
from qwen3vl_disagg.assets import tiny_folder
from qwen3vl_disagg.checkpoint import load
from qwen3vl_disagg.llm import llm as module


@pytest.fixture(scope="module")
def num_bytes() -> int:
    """Of the packaged decoder, as its file has it."""
    weights = load_file(tiny_folder() / "model.safetensors")
    return sum(weight.nbytes for name, weight in weights.items() if not name.startswith("model.visual."))


@pytest.mark.parametrize(
    ("is_terminal", "progress", "more_bytes", "has_bars", "has_line"),
    [
        (False, None, 1, False, False),  # a byte less than what is long
        (True, False, 0, False, True),
        (True, None, 0, True, False),
    ],
    ids=["small", "long", "terminal"],
)
def test_what_is_long_has_a_line_and_who_looks_on_bars(
    monkeypatch, capsys, caplog, num_bytes, is_terminal, progress, more_bytes, has_bars, has_line
):
    monkeypatch.setattr(load, "BAR_S", 0.0)
    monkeypatch.setattr(module, "LONG_BYTES", num_bytes + more_bytes)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    caplog.set_level("INFO", "qwen3vl_disagg.events")
    LLM(progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("100%" in err) == has_bars
    assert has_bars or err == ""
    assert len(caplog.messages) == has_line
    for line in caplog.messages:
        size = f"{num_bytes / 2**20:.1f} MiB"
        assert re.fullmatch(rf"at \d+\.\d s: reading the weights of the decoder, {re.escape(size)}", line)
