"""`LLM` with images that come again: same answers, no second encoding, times that add up."""

from __future__ import annotations

from typing import Any

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import EncodeOptions
from tests.support.scenes import Asked, ask_scenes

OFF = EncodeOptions(embedding_cache_mib=0, vision_batch_tokens=0)
SAMPLING = SamplingParams(max_new_tokens=24, logprobs=1)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Asked]:
    return ask_scenes(tmp_path_factory.mktemp("scenes"), seed=78, count=12)


def conversation(entry: Asked, system: str) -> list[dict[str, Any]]:
    """A system turn in front of it: no keys and values of another conversation fit."""
    return [{"role": "system", "content": system}, *entry.messages()]


def test_an_image_that_comes_again_is_not_encoded_and_has_the_same_answer(asked):
    entry = next(entry for entry in asked if len(entry.images) == 1)
    plain, cached = LLM(encode_options=OFF), LLM()
    for number, system in enumerate(["red", "blue", "green"]):
        [expected] = plain.chat([conversation(entry, system)], SAMPLING)
        [answer] = cached.chat([conversation(entry, system)], SAMPLING)
        assert (answer.token_ids, answer.logprobs) == (expected.token_ids, expected.logprobs)
        [item], [other] = answer.timings.items, expected.timings.items
        assert (item.cached, other.cached) == (number > 0, False)
        assert (item.encode == 0) is (item.preprocess == 0) is item.cached
    assert (cached.transfer.pipeline.num_batches, plain.transfer.pipeline.num_batches) == (1, 3)
    assert (cached.transfer.pipeline.cache.num_hits, len(plain.transfer.pipeline.cache)) == (2, 0)


def test_images_that_are_encoded_together_share_the_time_of_their_batch(asked):
    entry = next(entry for entry in asked if len(entry.images) == 2)
    [together] = LLM().chat([entry.messages()], SAMPLING)
    first, second = together.timings.items
    assert first.batch == second.batch == 1
    assert together.timings.encode == first.encode == second.encode
    [apart] = LLM(encode_options=OFF).chat([entry.messages()], SAMPLING)
    first, second = apart.timings.items
    assert (first.batch, second.batch) == (1, 2)
    assert apart.timings.encode == pytest.approx(first.encode + second.encode)
    assert apart.token_ids == together.token_ids


def test_options_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="negative"):
        LLM(encode_options=EncodeOptions(embedding_cache_mib=-1))
