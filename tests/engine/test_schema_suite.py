"""The public JSON Schema test suite: answers validate, and what it calls invalid is not let through.

Its checkout is named by the environment variable JSON_SCHEMA_TEST_SUITE (github.com/json-schema-org/JSON-Schema-Test-
Suite), the tokenizer as in `test_schemas.py`. A server reads every schema as draft 2020-12 has it.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from tests.engine.test_schemas import World, packaged, published

SUITE = "JSON_SCHEMA_TEST_SUITE"
DRAFTS = {"draft7": jsonschema.Draft7Validator, "draft2020-12": jsonschema.Draft202012Validator}
NUM_ANSWERS = 3
"""Of each schema, with seeds of their own."""
OTHERWISE = ("$ref prevents a sibling $id", "ref overrides any sibling keywords")
"""Groups of draft 7 that draft 2020-12 reads in another way."""
SHARES = {"valid": 0.93, "taken": 0.45}
"""At least so many of the valid instances are answers, of the schemas that are taken, and so many schemas are. Left out
are other spellings of what is the same value (1.0 for 1, properties in another order), and texts that are not of their
format, which the suite takes for a remark."""


def groups(draft: str) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """Name, schema and its instances, of all that is not optional."""
    for file in sorted((Path(os.environ[SUITE]) / "tests" / draft).glob("*.json")):
        for group in json.loads(file.read_text()):
            if not any(name in group["description"] for name in OTHERWISE):
                yield f"{file.stem}: {group['description']}", group["schema"], group["tests"]


def accepts(world: World, grammar: Grammar, text: str) -> bool:
    """Whether the text, whole, is an answer by this grammar."""
    matcher = world.compile(grammar, [])
    for token_id in spelled(world, text):
        if not _is_set(matcher.mask(), token_id):
            return False
        matcher.consume(token_id)
    return any(_is_set(matcher.mask(), end) for end in world.ends)


def spelled(world: World, text: str) -> list[int]:
    """As the tokenizer has it, byte for byte where it would compose letters."""
    if unicodedata.is_normalized("NFC", text):
        return world.tokenizer.encode(text)
    tokens = {world.tokenizer.token_bytes(i): i for i in range(world.tokenizer.vocab_size)}
    return [tokens[bytes([byte])] for byte in text.encode()]


def _is_set(mask: Any, token_id: int) -> bool:
    return bool(mask.bits[token_id // 8] >> token_id % 8 & 1)


def run(world: World, draft: str) -> Counter[str]:
    """How many schemas are taken, instances accepted, answers valid. AssertionError for what is let through wrongly."""
    seen: Counter[str] = Counter()
    for name, schema, cases in groups(draft):
        seen["schemas"] += 1
        if not isinstance(schema, dict):
            seen["schemas that are no object"] += 1
            continue
        grammar = Grammar.of_schema(schema)
        try:
            world.compile(grammar, [])
        except InputError as error:
            if (error.code, error.status) != ("invalid_request", 400):
                raise
            seen["refused by name"] += 1
            continue
        seen["taken"] += 1
        for case in cases:
            forms = {json.dumps(case["data"], ensure_ascii=False, separators=ways) for ways in (None, (",", ":"))}
            is_let = any(accepts(world, grammar, form) for form in forms)
            assert case["valid"] or not is_let, (name, case)
            seen[f"{'valid' if case['valid'] else 'invalid'} {'accepted' if is_let else 'refused'}"] += 1
        if "\\p{" in json.dumps(schema):  # Python's `re`, by which jsonschema judges, does not know it
            continue
        for seed in range(NUM_ANSWERS):
            text = world.answer(schema, seed)
            if text is None:
                seen["cut"] += 1
                continue
            DRAFTS[draft](schema).validate(json.loads(text))
            seen["answers that validate"] += 1
    return seen


def check(world: World, draft: str) -> None:
    seen = run(world, draft)
    print(f"\n{draft}: {dict(seen)}")
    assert seen["taken"] >= SHARES["taken"] * seen["schemas"]
    assert seen["valid accepted"] >= SHARES["valid"] * (seen["valid accepted"] + seen["valid refused"])
    assert seen["answers that validate"] > 10 * seen["cut"]


needs_suite = pytest.mark.skipif(SUITE not in os.environ, reason=f"{SUITE} names no checkout")


@needs_suite
@pytest.mark.acceptance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("world", [packaged, published], ids=["small", "published"])
def test_the_public_suite(world, draft):
    check(world(), draft)


def test_what_such_a_suite_would_find():
    """The same, over a few of its kind, one of each keyword that is taken."""
    world = packaged()
    for schema, valid, invalid in [
        ({"type": "integer", "minimum": 3}, [3, 10], [2, "3", 3.5]),
        ({"enum": [6, "foo", [], True, {"foo": 12}]}, [6, [], {"foo": 12}], [4, {"foo": 13}, "fo"]),
        ({"properties": {"a": {"maxLength": 2}}, "required": ["a"]}, [{"a": "xy"}, {"a": 5}], [{}, {"a": "xyz"}]),
        ({"prefixItems": [{"type": "string"}], "items": False}, [[], ["a"]], [[1], ["a", 1]]),
        ({"const": "a\u0308"}, ["a\u0308"], ["\u00e4"]),
        ({"additionalProperties": {"type": "boolean"}}, [{"x": True}, {}], [{"x": 1}]),
    ]:
        grammar = Grammar.of_schema(schema)
        for value in valid:
            assert accepts(world, grammar, json.dumps(value, ensure_ascii=False)), (schema, value)
        for value in invalid:
            assert not accepts(world, grammar, json.dumps(value, ensure_ascii=False)), (schema, value)
