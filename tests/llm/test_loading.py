"""What `LLM` says while it loads: nothing, unless that takes long or somebody looks on."""

from __future__ import annotations

import re
import sys

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.checkpoint import load
from qwen3vl_disagg.llm import llm as module


@pytest.fixture(autouse=True)
def bars_at_once(monkeypatch) -> None:
    monkeypatch.setattr(load, "BAR_S", 0.0)


def test_what_is_small_is_loaded_in_silence(capsys, caplog):
    caplog.set_level("INFO", "qwen3vl_disagg.events")
    LLM()
    assert capsys.readouterr() == ("", "")
    assert caplog.text == ""


@pytest.mark.parametrize(("size", "num_lines"), [(3_700_224, 1), (1 << 30, 0)])
def test_what_takes_long_has_a_line_of_the_log(monkeypatch, capsys, caplog, size, num_lines):
    monkeypatch.setattr(module, "LONG_BYTES", size)
    caplog.set_level("INFO", "qwen3vl_disagg.events")
    LLM()
    assert len(caplog.messages) == num_lines
    for line in caplog.messages:
        assert re.fullmatch(r"at \d+\.\d s: reading the weights of the decoder, \d\.\d MiB", line)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [None, False, True])
def test_in_a_terminal_there_are_bars_unless_they_are_not_wanted(monkeypatch, capsys, caplog, progress):
    monkeypatch.setattr(module, "LONG_BYTES", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    caplog.set_level("INFO", "qwen3vl_disagg.events")
    LLM(progress=progress)
    has_bars = progress is not False
    assert ("100%" in capsys.readouterr().err) == has_bars
    assert bool(caplog.messages) != has_bars
