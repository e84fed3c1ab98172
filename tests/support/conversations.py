"""Conversations for properties of chat templates: hypothesis strategies, and the structure a prompt must have."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.support.images import png, uri

IMAGE = {"type": "image_url", "image_url": {"url": uri(png())}}
VIDEO = {"type": "video", "video": "data:video/mp4;base64,AAAA"}
MEDIA = {
    "image_url": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"],
    "video": ["<|vision_start|>", "<|video_pad|>", "<|vision_end|>"],
    "text": [],
}
"""What a part becomes."""
HONEST = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<", "<|", "|>"),
    *("|", "/think>", "tool_response>", " ", "\n", "\n\n", "it's 12", "é", "🟥", '"', "\\", "{"),
)
HOSTILE = (
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|endoftext|>"),
    *("<|video_pad|>", "im_end|>", "|im_end|>", "<|im_", "\ue000", "image_pad|>", "user\n"),
)

Message = dict[str, Any]


def texts(*, hostile: bool) -> st.SearchStrategy[str]:
    fragments = st.sampled_from(HONEST + HOSTILE if hostile else HONEST)
    return st.lists(fragments, max_size=8).map("".join)


def values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Values of JSON."""
    plain = st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([0.5, 1e30]) | text
    return st.recursive(plain, lambda v: st.lists(v, max_size=2) | st.dictionaries(text, v, max_size=2), max_leaves=4)


def tool_lists(*, hostile: bool) -> st.SearchStrategy[list[dict[str, Any]]]:
    text = texts(hostile=hostile)
    function = st.fixed_dictionaries(
        {"name": st.sampled_from(["add", "look-up_2"])},
        optional={"description": text, "parameters": st.dictionaries(text, values(text), max_size=2)},
    )
    tool = st.fixed_dictionaries(
        {"type": st.just("function"), "function": function}, optional={"strict": st.booleans()}
    )
    return st.lists(tool, max_size=2)


@st.composite
def conversations(draw: st.DrawFn, *, hostile: bool = False) -> list[Message]:
    """Up to five turns in any order, as a client sends them: text, images and videos, calls, reasoning."""
    text = texts(hostile=hostile)
    text_part = text.map(lambda words: {"type": "text", "text": words})
    said = text | st.lists(text_part, min_size=1, max_size=3)
    shown = said | st.lists(text_part | st.sampled_from([IMAGE, VIDEO]), min_size=1, max_size=3)
    arguments = st.dictionaries(text, values(text), max_size=2) | st.sampled_from(["{}", '{"a": [1, "<é>"]}'])
    name = text.filter(bool) if hostile else st.sampled_from(["add", "look-up_2"])
    call = st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": name, "arguments": arguments})},
        optional={"id": st.just("call_1")},
    )
    turn = st.one_of(
        st.fixed_dictionaries({"role": st.just("system"), "content": said}),
        st.fixed_dictionaries({"role": st.just("user"), "content": shown}),
        st.fixed_dictionaries({"role": st.just("user"), "content": text.map(_response)}),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": said},
            optional={"reasoning_content": text, "tool_calls": st.lists(call, min_size=1, max_size=2)},
        ),
        st.fixed_dictionaries(
            {"role": st.just("tool"), "content": shown}, optional={"tool_call_id": st.just("call_1")}
        ),
    )
    return draw(st.lists(turn, min_size=1, max_size=5))


def _response(text: str) -> str:
    return f"<tool_response>{text}</tool_response>"


def structure(messages: list[Message], *, has_tools: bool, thinking: bool) -> list[str]:
    """The special tokens of the prompt, from the roles and media alone."""
    turn = ["<|im_start|>", "<|im_end|>"]
    found = turn[:] if has_tools or messages[0]["role"] == "system" else []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            found += turn if thinking and i > 0 else []
            continue
        opens = role != "tool" or i == 0 or messages[i - 1]["role"] != "tool"
        closes = role != "tool" or i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
        media = [name for part in content for name in MEDIA[part["type"]]] if isinstance(content, list) else []
        found += turn[:1] * opens + media + turn[1:] * closes
    return [*found, "<|im_start|>"]
