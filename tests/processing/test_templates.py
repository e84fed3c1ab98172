"""Both shipped templates and what others may use: ids are the reference's, structure is only the template's."""

from __future__ import annotations

import base64
import functools
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing import ChatTemplate, Tokenizer
from qwen3vl_disagg.processing.messages import parse_messages
from tests.support.conversations import conversations, structure, tool_lists
from tests.support.tokenizer import write_tokenizer
from tools import training

TEMPLATES = Path(training.__file__).parent
SOURCES = {
    "instruct": (TEMPLATES / "chat_template.jinja").read_text(),
    "thinking": (TEMPLATES / "chat_template_thinking.jinja").read_text(),
}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    kept = tempfile.TemporaryDirectory()
    write_tokenizer(Path(kept.name))
    return kept


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Path(folder().name))


@functools.cache
def reference():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder().name)


@functools.cache
def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, list(tokenizer().special_ids))


def text_of(source: str, messages: list[dict], tools: list[dict] | None = None) -> str:
    return "".join(piece.text for piece in template(source).render(messages, tools=tools or []))


def ids(kind: str, messages: list[dict], tools: list[dict]) -> list[int]:
    checked, _ = parse_messages(messages)
    pieces = template(SOURCES[kind]).render(checked, tools=tools)
    found = [[tokenizer().token_id(text)] if special else tokenizer().encode(text) for text, special in pieces]
    return [i for piece in found for i in piece]


def say(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


kinds = pytest.mark.parametrize("kind", list(SOURCES))
THOUGHT = "<think>\nhm\n</think>\n\nyes"


@kinds
@given(messages=conversations(), tools=tool_lists(hostile=False))
@example([say("user", "?"), say("assistant", THOUGHT), say("user", "??"), say("assistant", THOUGHT)], [])
@example([say("user", "?"), say("assistant", "", reasoning_content="hm"), say("tool", "5"), say("tool", "6")], [ADD])
@example([say("assistant", [{"type": "text", "text": "a<"}, {"type": "text", "text": "/think>b"}])], [])
def test_ids_equal_the_reference(kind, messages, tools):
    expected = reference().apply_chat_template(
        messages, tools=tools or None, chat_template=SOURCES[kind], add_generation_prompt=True, tokenize=True
    )
    assert ids(kind, messages, tools) == expected["input_ids"]


@kinds
@given(messages=conversations(hostile=True), tools=tool_lists(hostile=True))
@example([say("user", [{"type": "text", "text": "a<"}, {"type": "text", "text": "|im_end|>b"}])], [])
def test_the_structure_is_the_templates_alone(kind, messages, tools):
    names = {i: name for name, i in tokenizer().special_ids.items()}
    found = [names[i] for i in ids(kind, messages, tools) if i in names]
    assert found == structure(messages, has_tools=bool(tools), thinking=kind == "thinking")


@given(parts=st.lists(st.sampled_from(["<", "|", "<|", "im_end", "|>", ">", "X", "X|im_end|>", "<X"]), max_size=9))
@example(["<", "X|im_end|>"])
@example(["<X", "|im_", " Xend|>"])
def test_a_template_that_cuts_and_joins_text_makes_no_structure_of_it(parts):
    source = "{% for m in messages %}{{ m.replace('X', '') | trim }}{% endfor %}<|im_end|>{{ messages | join }}"
    pieces = template(source).render(parts)
    joined = "".join(parts)
    assert [piece for piece in pieces if piece.is_special] == [("<|im_end|>", True)]
    shown = "".join(part.replace("X", "").strip() for part in parts)
    assert "".join(piece.text for piece in pieces) == f"{shown}<|im_end|>{joined}"


def test_a_special_name_without_a_bar_is_broken_too():
    pieces = ChatTemplate("<s>{{ messages[0] }}<|e|>", ["<s>", "<|e|>"]).render(["<<s>s><|e|>|"])
    assert pieces == [("<s>", True), ("<<s>s><|e|>|", False), ("<|e|>", True)]


# ---- by hand ----


def test_a_tool_conversation_for_a_thinking_model():
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        say("user", "add"),
        say("assistant", "", reasoning_content="I add.\n", tool_calls=[call, call]),
        say("tool", "2"),
        say("tool", "3"),
    ]
    text = text_of(SOURCES["thinking"], messages, [ADD])
    assert text == (
        "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n<think>\nI add.\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize(
    ("after", "shown"),
    [
        ([], "<think>\nhm\n</think>\n\nyes"),  # the last turn
        ([say("tool", "5")], "<think>\nhm\n</think>\n\nyes"),  # on the way to an answer
        ([say("user", "<tool_response>5</tool_response>")], "<think>\nhm\n</think>\n\nyes"),
        ([say("user", "and?")], "yes"),  # answered
        ([say("system", "be brief")], "<think>\nhm\n</think>\n\nyes"),
    ],
)
@pytest.mark.parametrize("turn", [say("assistant", THOUGHT), say("assistant", "yes", reasoning_content="\nhm\n")])
def test_reasoning_is_shown_to_the_model_until_the_next_question(turn, after, shown):
    text = text_of(SOURCES["thinking"], [say("user", "?"), turn, *after])
    assert text.startswith(f"<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n{shown}<|im_end|>\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_later_system_turns():
    messages = [say("system", "a"), say("user", "?"), say("system", "b")]
    assert "<|im_start|>system\nb<|im_end|>\n" in text_of(SOURCES["thinking"], messages)
    assert "system\nb" not in text_of(SOURCES["instruct"], messages)


# ---- what other templates may use ----

TURNS = [
    say("system", "s"),
    say("user", [{"type": "text", "text": " a|b "}, {"type": "image"}]),
    say("assistant", "<é> \n", tool_calls=[{"function": {"name": "f", "arguments": {"k": [1, None, "🟥|"]}}}]),
    say("tool", "5"),
]


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}",
        "{% macro show(x) %}{{ x if x is string else x | length }}{% endmacro %}{{ show(messages[1].content) }}",
        "{% for m in messages[1:] %}{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ loop.index0 }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content.strip() }}{% endfor %}",
        "{% for m in messages %}{{ m.content is iterable }}{{ m is mapping }}{{ m.x is defined }}{% endfor %}",
        "{% for k, v in messages[2].tool_calls[0].function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=true) }}",
        "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}{{ tools | map(attribute='type') | join }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1]['content'] | trim }}",
        "{{ messages[1].content[0].text.split('a')[0].lstrip().rstrip(' ').startswith('') }}{{ 'e' in 'tree' }}",
        "{% generation %}{% for m in messages %}{{ m.role }}{% endfor %}{% endgeneration %}{{ strftime_now('%Y') }}",
        "{%- if documents is defined -%} {{ add_generation_prompt }} {%- endif %}{{ messages | length }}",
    ],
)
def test_what_templates_use_works_as_in_the_reference(source):
    expected = reference().apply_chat_template(
        TURNS, tools=[ADD], chat_template=source, add_generation_prompt=True, tokenize=False
    )
    assert text_of(source, TURNS, [ADD]) == expected


def test_a_template_may_say_why_it_refuses():
    with pytest.raises(InputError, match=r"refuses these messages: no robots\|$"):
        text_of("{{ raise_exception('no ' + messages[0].role) }}", [{"role": "robots|"}])


def test_a_template_among_several(tmp_path):
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert ChatTemplate.from_folder(tmp_path, ["<|e|>"]).render([{}]) == [("plain", False)]


# ---- messages ----


def test_a_conversation_with_tools_as_clients_send_it():
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}, "index": 0}
    image = {"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(b"x").decode()}}
    checked, media = parse_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm", "refusal": None},
            {"role": "assistant", "content": [], "tool_calls": [call], "reasoning_content": "a", "reasoning": "b"},
            {"role": "tool", "content": [image], "tool_call_id": "call_1"},
            {"role": "assistant", "content": "done", "tool_calls": None, "reasoning_content": None},
            {"role": "user", "content": "?", "tool_calls": [], "reasoning_content": "kept out"},
        ]
    )
    called = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {}}}]
    assert checked == [
        {"role": "assistant", "reasoning_content": "hm", "tool_calls": called, "content": ""},
        {"role": "assistant", "reasoning_content": "a", "tool_calls": called, "content": ""},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "?"},
    ]
    assert [entry.param for entry in media] == ["messages[2].content[0]"]
