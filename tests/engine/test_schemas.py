"""Any schema, random logits at temperature 1: every answer that is not cut parses and validates."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.llguidance_matcher import LlguidanceCompiler
from qwen3vl_disagg.engine.sampler import Sampler
from qwen3vl_disagg.engine.sampling import SamplingRow
from qwen3vl_disagg.processing.tokenizer import IM_END, Tokenizer
from tests.support.grammars import tokenizer as packaged_tokenizer
from tests.support.published import NUM_ROWS, write_tokenizer

MAX_TOKENS = 250
TOKENIZER = "QWEN3_TOKENIZER"
"""A published tokenizer.json, for who has one; else one of its size and special tokens is made."""

names = st.text('ab_ "\\é\u0301日\n', min_size=1, max_size=6)
texts = st.text(max_size=8).filter(lambda text: text.isprintable() or not text)
numbers = st.integers(-(10**9), 10**9)
values = st.one_of(texts, numbers, st.booleans(), st.none(), st.lists(st.integers(0, 9), max_size=2))
PATTERNS = ["^[a-c]{2,4}$", "^\\d+(\\.\\d)?$", "^(red|blue)-[0-9A-F]{3}$", "x", "^é*$", '^["\\\\/]{1,3}$']
FORMATS = ["date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "something else"]


@st.composite
def bounds(draw, low: str, high: str, least: int, most: int) -> dict[str, int]:
    first, second = sorted(draw(st.tuples(st.integers(least, most), st.integers(least, most))))
    return {k: v for k, v in {low: first, high: second}.items() if draw(st.booleans())}


leaves = st.one_of(
    bounds("minLength", "maxLength", 0, 12).map(lambda more: {"type": "string", **more}),
    st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name}),
    bounds("minimum", "maximum", -2000, 2000).map(lambda more: {"type": "integer", **more}),
    bounds("minimum", "maximum", -9, 9).map(lambda more: {"type": "number", **more}),
    st.sampled_from([2, 5, 12]).map(lambda factor: {"type": "integer", "multipleOf": factor}),
    st.lists(values, min_size=1, max_size=5).map(lambda entries: {"enum": entries}),
    values.map(lambda value: {"const": value}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}, {}]),
)


@st.composite
def objects(draw, children) -> dict[str, Any]:
    properties = draw(st.dictionaries(names, children, max_size=4))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if properties and draw(st.booleans()):
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    if draw(st.booleans()):
        schema["additionalProperties"] = draw(st.one_of(st.just(False), children))
    return schema


@st.composite
def arrays(draw, children) -> dict[str, Any]:
    schema = {"type": "array", "items": draw(children), **draw(bounds("minItems", "maxItems", 0, 4))}
    return {**schema, "prefixItems": draw(st.lists(children, max_size=2))} if draw(st.booleans()) else schema


def nested(children):
    choices = st.lists(children, min_size=1, max_size=3).map(lambda ways: {"anyOf": ways})
    return st.one_of(objects(children), arrays(children), choices)


TREE = {
    "$defs": {"tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}, "v": {"enum": [1, 2]}}}},
    "$ref": "#/$defs/tree",
}
schemas = st.one_of(st.recursive(leaves, nested, max_leaves=8), st.just(TREE))


class World:
    """A vocabulary, and logits over it in which what ends an answer becomes likelier with each token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.ends = frozenset({tokenizer.token_id(IM_END), tokenizer.token_id("<|endoftext|>")})
        self.compile = LlguidanceCompiler(tokenizer, vocab_size, eos_ids=self.ends)
        self.sampler = Sampler(banned_ids=[], eos_ids=self.ends)
        self.closing = torch.zeros(vocab_size)
        for token_id in range(tokenizer.vocab_size):
            data = tokenizer.token_bytes(token_id)
            if len(data) <= 2:
                self.closing[token_id] = 1.0 if data[-1:] in (b'"', b"}", b"]") else 0.2
        self.closing[list(self.ends)] = 1.0
        self.num_seen = self.num_refused = self.num_cut = 0

    def check(self, schema: dict[str, Any], seed: int) -> None:
        self.num_seen += 1
        try:
            text = self.answer(schema, seed)
        except InputError as error:
            if error.code != "invalid_request":  # it is refused at once, or never
                raise
            self.num_refused += 1
            return
        if text is None:
            self.num_cut += 1
            return
        value = json.loads(text)
        kind = jsonschema.Draft202012Validator
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)

    def answer(self, schema: dict[str, Any], seed: int) -> str | None:
        """None where it is cut."""
        matcher = self.compile(Grammar.of_schema(schema), [])
        generator, ids = torch.Generator().manual_seed(seed), list[int]()
        row = SamplingRow(SamplingParams(temperature=1.0, seed=seed), seed, [], ids)
        for number in range(MAX_TOKENS):
            logits = torch.randn(self.vocab_size, generator=generator) * 2 + self.closing * (8 + 0.2 * number)
            [token_id], _ = self.sampler.sample(logits[None], [row], [matcher.mask()])
            assert token_id is not None
            if token_id in self.ends:
                return b"".join(self.tokenizer.token_bytes(i) for i in ids).decode()
            ids.append(token_id)
            matcher.consume(token_id)
        return None


@functools.cache
def packaged() -> World:
    return World(packaged_tokenizer(), 500)


@functools.cache
def published() -> World:
    if os.environ.get(TOKENIZER):
        return World(Tokenizer(tokenizers.Tokenizer.from_file(os.environ[TOKENIZER])), NUM_ROWS)
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return World(Tokenizer.from_folder(Path(folder)), NUM_ROWS)


anything = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **anything)
@given(schemas, st.integers(0, 2**31))
def test_answers_validate(schema, seed):
    packaged().check(schema, seed)


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_answers_validate_over_a_published_vocabulary():
    world = published()

    @settings(max_examples=2400, database=None, **anything)
    @given(schemas, st.integers(0, 2**31))
    def check(schema, seed):
        world.check(schema, seed)

    check()
    assert world.num_seen - world.num_refused - world.num_cut >= 2000, vars(world)


def test_texts_that_are_not_composed():
    """A tokenizer composes what it is given; what is forced must not be."""
    world = packaged()
    for value in ("e\u0301", "a e\u0301\u0302 b", "\u1100\u1161"):
        assert json.loads(world.answer({"const": value}, 1) or "") == value
        assert np.unpackbits(world.compile.ends).sum() == 2
