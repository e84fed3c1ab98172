"""Every spelling of what an answer must be, and of how tools are called, means the same grammar to the ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import structs

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import MAX_GRAMMAR_CHARS, Grammar, GrammarTool
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import AnswerParts, Prompt
from qwen3vl_disagg.processing.answer_grammar import begins_in_reasoning
from qwen3vl_disagg.serving.chat_request import parse_chat_request
from qwen3vl_disagg.serving.grammar_fields import GRAMMAR_FIELDS
from tests.support.fake_backend import ASK, PATH, FakeBackend, answer_of, answer_steps, serve, tiny_processor

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SPELLED = json.dumps(SCHEMA)
ADD = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
WAIT = {"type": "function", "function": {"name": "wait"}}
TOOLS = (GrammarTool("add", SPELLED), GrammarTool("wait", "{}"))
ANY_OBJECT = '{"type": "object"}'
LARK = 'start: "a"'
EXAMPLES = [
    ("response_format", {"type": "json_object"}),
    ("structured_outputs", {"regex": "a+"}),
    *((name, SCHEMA) for name in ("json_schema", "guided_json", "format")),
    *((name, "a+") for name in ("regex", "guided_regex")),
    *((name, ["a", "b"]) for name in ("choice", "guided_choice")),
    *((name, LARK) for name in ("grammar", "ebnf", "guided_grammar")),
    ("guided_json_object", True),
]


def grammar(**fields: Any) -> Grammar | None:
    return parse_chat_request({**ASK, **fields}, model_names=["tiny"])[0].grammar


def named(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json", ANY_OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json", SPELLED),
        ({"response_format": named(SCHEMA)}, "json", SPELLED),
        ({"response_format": named(SCHEMA, strict=True, description="d")}, "json", SPELLED),
        ({"response_format": named(SCHEMA, strict=False)}, "json", SPELLED),
        ({"structured_outputs": {"json": SCHEMA}}, "json", SPELLED),
        ({"structured_outputs": {"json": SPELLED, "regex": None}}, "json", SPELLED),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, "json", ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"structured_outputs": {"grammar": LARK}}, "lark", LARK),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, "json", SPELLED),
        ({"guided_json": SPELLED}, "json", SPELLED),
        ({"guided_json_object": True}, "json", ANY_OBJECT),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["é"]}, "choice", '["é"]'),
        ({"guided_grammar": LARK}, "lark", LARK),
        ({"json_schema": SPELLED}, "json", SPELLED),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["a"]}, "choice", '["a"]'),
        ({"grammar": LARK}, "lark", LARK),
        ({"ebnf": LARK}, "lark", LARK),
        ({"format": "json"}, "json", ANY_OBJECT),
        ({"format": SCHEMA}, "json", SPELLED),
    ],
)
def test_a_spelling_of_the_content(fields, kind, text):
    found = grammar(**fields)
    assert found is not None
    assert (found.kind, found.text, found.tools) == (kind, text, ())
    assert found.param.startswith(next(iter(fields)))


@pytest.mark.parametrize("name", GRAMMAR_FIELDS)
def test_a_completion_has_the_same_from_its_first_token_on(name, unchecked):
    fields = {name: dict(EXAMPLES)[name]}
    backend = FakeBackend()
    tokenizer = tiny_processor().tokenizer
    prompts = [[5, 6, 7], [tokenizer.token_id("<|im_start|>"), *tokenizer.encode("assistant\n<think>\n")]]
    reply = serve(backend).post("/v1/completions", json={"prompt": prompts, "max_tokens": 3, **fields})
    assert reply.status_code == 200, reply.text
    expected = grammar(**fields)
    assert expected is not None
    found = [handle.sampling.grammar for handle in backend.handles]
    assert found == [structs.replace(expected, is_from_start=True)] * 2
    assert not begins_in_reasoning(found[0], tokenizer, prompts[1])
    assert begins_in_reasoning(expected, tokenizer, prompts[1])
    scored = {"prompt": [5, 6], "echo": True, "logprobs": 1, "max_tokens": 0, **fields}
    assert serve(backend).post("/v1/completions", json=scored).status_code == 200
    assert backend.handles[-1].sampling.grammar is None


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"regex": "", "ebnf": None}]
    + [{name: None} for name in GRAMMAR_FIELDS]
    + [{"tools": [ADD]}, {"tools": [ADD], "parallel_tool_calls": True, "tool_choice": "auto"}]
    + [{"parallel_tool_calls": False}, {"tools": [ADD], "tool_choice": "none", "parallel_tool_calls": False}],
)
def test_what_asks_for_nothing(fields):
    assert grammar(**fields) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool_choice": "required"}, ("calls", TOOLS, 0)),
        ({"tool_choice": "any"}, ("calls", TOOLS, 0)),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ("calls", TOOLS, 1)),
        ({"tool_choice": {"type": "function", "function": {"name": "wait"}}}, ("calls", TOOLS[1:], 1)),
        ({"tool_choice": {"type": "function", "name": "add"}}, ("calls", TOOLS[:1], 1)),
        ({"parallel_tool_calls": False}, ("text", TOOLS, 1)),
        ({"response_format": {"type": "json_object"}}, ("json", TOOLS, 0)),
        ({"regex": "a", "parallel_tool_calls": False}, ("regex", TOOLS, 1)),
        ({"regex": "a", "tool_choice": "required"}, ("calls", TOOLS, 0)),
        ({"regex": "a", "tool_choice": "none"}, ("regex", (), 0)),
    ],
)
def test_how_tools_are_called(fields, expected):
    found = grammar(tools=[ADD, WAIT], **fields)
    assert found is not None
    assert (found.kind, found.tools, found.max_calls) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": named([])}, "response_format.json_schema.schema"),
        ({"response_format": named(SCHEMA, strict="yes")}, "response_format.json_schema.strict"),
        ({"response_format": named({"enum": ["x" * MAX_GRAMMAR_CHARS]})}, "response_format.json_schema.schema"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex"),
        ({"structural_tag": "{}"}, "structural_tag"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice"),
        ({"regex": 5}, "regex"),
        ({"grammar": {"type": "json"}}, "grammar"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "often"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"function": "add"}}, "tool_choice"),
        ({"tools": [ADD], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
def test_what_is_wrong_is_named(fields, param):
    with pytest.raises(InputError) as caught:
        grammar(**fields)
    assert caught.value.param == param
    assert caught.value.status == 400


def told(text: str, **fields: Any) -> dict[str, Any]:
    """The choice that comes of a model's text."""
    processor = tiny_processor()

    def script(prompt: Prompt, sampling: SamplingParams):
        return answer_steps(text, sampling)

    reply = serve(FakeBackend(script), processor=processor).post(PATH, json={**ASK, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


@pytest.fixture
def unchecked(monkeypatch):
    """Grammars go to the ranks as they are: no children in these tests."""
    monkeypatch.setattr(tiny_processor(), "folder", None)


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_a_call_that_stands_in_json_is_text(unchecked):
    text = json.dumps({"a": f"so {CALL} then"})
    choice = told(text, tools=[ADD], response_format={"type": "json_object"})
    assert choice["message"]["content"] == text
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


def test_a_call_in_place_of_json(unchecked):
    choice = told(CALL, tools=[ADD], response_format={"type": "json_object"})
    assert choice["message"]["content"] is None
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["add"]
    assert choice["finish_reason"] == "tool_calls"


def test_calls_alone_however_the_text_is_cut():
    text = f'{{"a": "{CALL[:11]}{{"}} and\n{CALL}'
    tokenizer = tiny_processor().tokenizer
    sampling = SamplingParams(grammar=Grammar(kind="json", text="{}", tools=TOOLS))
    for with_breaks in ("", "\n\n"):
        parts = AnswerParts(tokenizer, frozenset(), sampling, [], with_tools=True)
        for token_id in tokenizer.encode(with_breaks + text):
            parts.push(token_id)
        parts.finish()
        assert parts.content == with_breaks + text
        assert parts.calls == []


def test_a_grammar_that_fails_on_the_rank_is_a_400(unchecked):
    failure = InputError("the grammar takes more work", param="regex", code="grammar_too_complex")

    def script(prompt: Prompt, sampling: SamplingParams):
        first, *rest = answer_of([5, 6], sampling)
        return [first, failure] if sampling.max_new_tokens == 1 else [first, rest[0], failure]

    client = serve(FakeBackend(script))
    reply = client.post(PATH, json={**ASK, "regex": "a", "max_tokens": 1})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "grammar_too_complex")
    reply = client.post(PATH, json={**ASK, "regex": "a", "stream": True, "max_tokens": 9})
    assert reply.status_code == 200
    events = [line for line in reply.text.splitlines() if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["param"] == "regex"


def test_without_the_library_it_is_a_400(unchecked, monkeypatch):
    monkeypatch.setattr("qwen3vl_disagg.serving.preparation.has_grammars", lambda: False)
    reply = serve(FakeBackend()).post(PATH, json={**ASK, "response_format": {"type": "json_object"}})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "not_installed"
    assert reply.json()["error"]["param"] == "response_format"
