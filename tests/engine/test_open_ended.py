"""Answers whose length nobody named, and requests that share no cache because their salts differ."""

from __future__ import annotations

import pytest
from msgspec import structs

from qwen3vl_disagg import LLM
from qwen3vl_disagg.engine.engine import EngineOptions
from tests.support.images import png

NUM_TOKENS = 256


@pytest.fixture(scope="module")
def llm() -> LLM:
    """With room for so many tokens of one request at a time."""
    text = LLM().config.text
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    return LLM(engine_options=EngineOptions(kv_cache_gib=NUM_TOKENS * token_bytes / 2**30))


def test_an_answer_ends_where_there_is_no_room_left(llm):
    assert llm.engine.scheduler.pool.num_pages * llm.engine.scheduler.pool.page_size == NUM_TOKENS
    sampling = llm.processor.generation.sampling(ignore_eos=True)
    [result] = llm.chat([[{"role": "user", "content": "?"}]], sampling)
    assert result.finish_reason == "length"
    assert len(result.prompt_token_ids) + len(result.token_ids) == NUM_TOKENS + 1


def test_without_a_word_an_answer_ends_by_itself(llm):
    [result] = llm.chat([[{"role": "user", "content": [{"type": "image", "image": png()}, "what is it?"]}]])
    assert result.finish_reason in ("stop", "length")
    assert llm.chat([[{"role": "user", "content": "?"}]])[0].usage.completion_tokens < NUM_TOKENS


def test_what_was_asked_for_is_not_cut(llm):
    sampling = llm.processor.generation.sampling(max_new_tokens=NUM_TOKENS)
    with pytest.raises(ValueError, match=r"keys and values|cache"):
        llm.chat([[{"role": "user", "content": "?"}]], sampling)


def test_caches_are_shared_among_equal_salts_only(llm):
    question = [{"role": "user", "content": "the red circle is above it " * 12}]
    sampling = llm.processor.generation.sampling(max_new_tokens=1)

    def cached(salt: str) -> int:
        [result] = llm.chat([question], structs.replace(sampling, cache_salt=salt))
        return result.timings.cached_tokens

    assert cached("") == 0
    assert cached("") > 0
    assert cached("mine") == 0
    assert cached("mine") > 0
    assert cached("yours") == 0
