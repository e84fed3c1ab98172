"""How long a text is, before it is tokenized: bounds that always hold, and slices that change nothing."""

from __future__ import annotations

import unicodedata
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing import tokenizer as module
from qwen3vl_disagg.processing.processor import SMALL_CHARS
from qwen3vl_disagg.processing.tokenizer import TooManyTokens
from tests.support.fake_backend import tiny_processor
from tests.support.images import png, uri

TOKENIZER = tiny_processor().tokenizer
CONTEXT = tiny_processor().config.text.max_position_embeddings
WORDS = st.sampled_from(
    ["red", " circle", "  ", "\n", "\r\n", "'s", "don't", "<think>", "<tool_call>", "a", "7", "..", " é"]
)
# What composing makes shorter: letters of Hangul, accents one by one, the Kelvin sign.
SHRINKING = st.sampled_from(
    ["\u1100\u1161\u11a8", "\u03b1\u0313\u0300\u0345", "e\u0301", "\u212a", "\ufb1d", "\U0001d15e"]
)
TEXTS = st.lists(WORDS | SHRINKING | st.text(max_size=8), max_size=60).map("".join)


def whole(text: str) -> list[int]:
    return TOKENIZER.backend.encode(text, add_special_tokens=False).ids


@given(TEXTS)
def test_the_bound_is_never_above_the_count(text):
    if text.encode("utf-8", "ignore").decode() == text:
        assert TOKENIZER.num_tokens_at_least(text * 20) <= len(whole(text * 20))


def test_the_bound_is_of_use():
    longest = max(map(TOKENIZER.token_bytes, range(TOKENIZER.vocab_size)), key=len)
    assert TOKENIZER.max_token_bytes == len(longest)
    assert TOKENIZER.num_tokens_at_least(longest.decode() * 1000) >= 1000 * 0.5
    assert TOKENIZER.num_tokens_at_least("\u0301" * 1000) >= 1999, "no token holds two of these bytes"


@given(TEXTS, st.integers(1, 40))
def test_slices_change_nothing(text, size):
    if text.encode("utf-8", "ignore").decode() != text:
        return
    before, module.SLICE_CHARS = module.SLICE_CHARS, size
    try:
        assert TOKENIZER.encode(text) == whole(text)
        assert "".join(TOKENIZER._slices(text)) == text
    finally:
        module.SLICE_CHARS = before


@pytest.mark.parametrize("size", [1, 2, 5, 11, 40])
def test_words_stay_whole(monkeypatch, size):
    text = "the red circle is above it, don't <think> so\n " * 8
    monkeypatch.setattr(module, "SLICE_CHARS", size)
    assert len(list(TOKENIZER._slices(text))) > 3
    assert TOKENIZER.encode(text) == whole(text)


def test_a_text_is_cut():
    assert TOKENIZER._has_qwen_words
    assert len(list(TOKENIZER._slices("red circle " * 30_000))) == 6


def test_a_long_text_is_left_as_soon_as_it_is_too_long(monkeypatch):
    seen: list[int] = []
    backend = TOKENIZER.backend
    assert TOKENIZER._has_qwen_words

    def encode(text: str, **options: bool) -> tokenizers.Encoding:
        seen.append(len(text))
        return backend.encode(text, **options)

    monkeypatch.setattr(TOKENIZER, "backend", SimpleNamespace(encode=encode))
    with pytest.raises(TooManyTokens):
        TOKENIZER.encode("q z " * 10**6, at_most=1000)
    assert sum(seen) < 2**17


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a" * 13_000_000}],
        [{"role": "user", "content": [{"type": "text", "text": "a" * 13_000}] * 1000}],
        [{"role": "user", "content": "?"}, {"role": "assistant", "reasoning_content": "a" * 13_000_000}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "a" * 13_000_000}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a" * 13_000_000: 1}}}]}],
    ],
    ids=["content", "parts", "thoughts", "arguments", "keys"],
)
def test_nothing_is_rendered_or_tokenized_that_cannot_fit(monkeypatch, messages):
    processor = tiny_processor()
    monkeypatch.setattr(processor.template, "render", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="the context is") as caught:
        processor.prepare(messages)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize("text", ["z" * CONTEXT * 12, "\u0301" * CONTEXT * 5, "red circle. " * CONTEXT], ids=range(3))
def test_nothing_is_tokenized_whose_bytes_are_too_many(monkeypatch, text):
    assert len(unicodedata.normalize("NFC", text)) > SMALL_CHARS
    processor = tiny_processor()
    monkeypatch.setattr(processor.tokenizer, "encode", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="the prompt has at least") as caught:
        processor.prepare([{"role": "user", "content": text}])
    assert caught.value.code == "context_length_exceeded"


def test_placeholders_are_counted_before_anything_is_tokenized(monkeypatch):
    processor = tiny_processor()
    monkeypatch.setattr(processor.tokenizer, "encode", lambda *_, **__: 1 / 0)
    image = {"type": "image", "image": uri(png((128, 128)))}
    rows = 16
    with pytest.raises(InputError, match="the context is") as caught:
        processor.prepare([{"role": "user", "content": [image] * (CONTEXT // rows + 1)}])
    assert caught.value.param == f"messages[0].content[{CONTEXT // rows}]"


def test_many_images_are_bound_by_the_context_alone():
    image = {"type": "image", "image": uri(png((128, 128)))}
    assert len(tiny_processor().prepare([{"role": "user", "content": [image] * 100}]).items) == 100
