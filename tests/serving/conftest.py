"""Fixtures of tests over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3vl_disagg.processing import ChatTemplate
from tests.support.fake_backend import tiny_processor
from tools import training


@pytest.fixture
def thinking(monkeypatch) -> None:
    """The checkpoint's template opens the model's reasoning."""
    source = (Path(training.__file__).parent / "chat_template_thinking.jinja").read_text()
    specials = list(tiny_processor().tokenizer.special_ids)
    monkeypatch.setattr(tiny_processor(), "template", ChatTemplate(source, specials))
