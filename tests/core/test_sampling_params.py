"""Sampling parameters are checked where they are made, by one table, whoever makes them."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.pooling import Pooling
from qwen3vl_disagg.core.readers import Number
from qwen3vl_disagg.core.sampling_params import DEFAULTS, NO_OPTIONS, OPTIONS, ORDER, ROUTES, SamplingParams
from qwen3vl_disagg.processing.generation import GenerationDefaults

CHECKPOINTS = GenerationDefaults(frozenset({0}))
NUMBERS = {name: option.kind for name, option in OPTIONS.items() if isinstance(option.kind, Number)}
WITHOUT_FLAG = {
    "n": "the command line gives one answer",
    "logit_bias": "a map",
    "prompt_logprobs": "an answer of the command line has no place for them",
    "skip_special_tokens": "true by default, and for programs that read positions of boxes",
}


def test_every_field_is_an_option_or_follows_from_the_rest():
    assert set(OPTIONS) | set(NO_OPTIONS) == set(DEFAULTS)
    assert not set(OPTIONS) & set(NO_OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_can_be_given_everywhere(name):
    option = OPTIONS[name]
    assert [route for route in ROUTES if not option.spellings(name, route)] == [], "no spelling in a body"
    assert (option.flag is None) == (name in WITHOUT_FLAG), "no flag on the command line, and no reason"
    assert (option.flag is None) or option.kind.flag_type is not None
    assert option.about
    assert option.step in ORDER
    params = SamplingParams(**{name: option.example})
    assert getattr(params, name) == option.example != DEFAULTS[name]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_no_two_options_have_one_spelling():
    for route in ROUTES:
        spelled = [spelling for name, option in OPTIONS.items() for spelling in option.spellings(name, route)]
        assert len(spelled) == len(set(spelled))


def wrong_values(name: str) -> list:
    low, high, whole = NUMBERS[name].low, NUMBERS[name].high, NUMBERS[name].is_whole
    far = [low - 1, high * 2 + 1, -math.inf, math.inf, math.nan, 10**400, -(10**400)]
    kinds = ["1", [1], {}, True, 1j, np.float32(1)]
    return far + kinds + ([low + 0.5, float(high)] if whole else []) + ([] if DEFAULTS[name] is None else [None])


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_its_bounds(name):
    others = {"max_new_tokens": 2**20} if name == "min_tokens" else {}
    for good in (NUMBERS[name].low, NUMBERS[name].high):
        assert getattr(SamplingParams(**{name: good}, **others), name) == good
    for bad in wrong_values(name):
        with pytest.raises(InputError) as caught:
            SamplingParams(**{name: bad})
        assert caught.value.param == name, bad
        assert name in str(caught.value)
        with pytest.raises(InputError):
            msgspec.structs.replace(SamplingParams(), **{name: bad})
        if bad is not None:  # None: the checkpoint's own
            with pytest.raises(InputError) as caught:
                CHECKPOINTS.sampling(**{name: bad})
            assert caught.value.param == name, bad


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 300]),
        ("stop", [5]),
        ("stop", None),
        ("stop", b"a"),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: -math.inf}),
        ("logit_bias", {1: 10**400}),
        ("logit_bias", {1: None}),
        ("logit_bias", {1: True}),
        ("logit_bias", {1.5: 1.0}),
        ("logit_bias", [1]),
        ("logit_bias", None),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("cache_salt", None),
    ],
)
def test_what_is_no_number_is_checked_too(name, bad):
    with pytest.raises(InputError) as caught:
        SamplingParams(**{name: bad})
    assert caught.value.param == name


def test_more_tokens_than_may_come():
    with pytest.raises(InputError, match="min_tokens is 9, but only 8 may come"):
        SamplingParams(min_tokens=9, max_new_tokens=8)


def test_spellings_that_mean_the_same():
    assert SamplingParams(stop="END").stop == ["END"]
    assert SamplingParams(stop=("a", "b")).stop == ["a", "b"]
    given = {"7": 1, 8: 2}
    params = SamplingParams(logit_bias=given)
    given[9] = math.nan
    assert params.logit_bias == {7: 1.0, 8: 2.0}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_ids_of_bad_words_are_bounded_together():
    most = [[5] * 4096] * 4
    assert SamplingParams(bad_words=[*most, "a"]).bad_words[:4] == most
    with pytest.raises(InputError, match="bad_words have 16385 tokens, up to 16384 may be"):
        SamplingParams(bad_words=[*most, [5]])


def test_what_is_pooled_of_a_prompt_is_one_thing():
    with pytest.raises(InputError, match="n must be 1") as caught:
        SamplingParams(n=2, pooling=Pooling())
    assert caught.value.param == "n"
