"""Messages -> ids: equal to the reference for honest text, and text can never become structure."""

from __future__ import annotations

import base64
import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import ChatTemplate, GenerationDefaults, ImageProcessor, Processor, Tokenizer
from qwen3vl_disagg.processing.patches import PixelSettings
from tests.support.random_model import small_config
from tests.support.tokenizer import write_tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|endoftext|>"]


def png(width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": uri(data)}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return make_processor(folder)


def make_processor(folder) -> Processor:
    tokenizer = Tokenizer.from_folder(folder)
    config: ModelConfig = small_config()
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    ids = {field: tokenizer.token_id(f"<|{name}|>") for field, name in names.items()}
    from dataclasses import replace

    config = replace(config, text=replace(config.text, vocab_size=400, max_position_embeddings=900), **ids)
    image = ImageProcessor(config.vision, PixelSettings(4096, 65536))
    template = ChatTemplate.from_folder(folder, list(tokenizer.special_ids))
    return Processor(config, tokenizer, image, template, GenerationDefaults(frozenset({1})))


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


CONVERSATIONS = [
    [{"role": "user", "content": "What colour is it?"}],
    [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": "a\n\nb "}],
    [{"role": "user", "content": [text_part("one"), text_part(" two"), text_part("\n3")]}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "it's <think>no</think> 12"},
        {"role": "system", "content": "dropped"},
        {"role": "user", "content": "naïve — Ünïcödé 🟥 e\u0301"},
    ],
    [{"role": "user", "content": [text_part("a < b | c > d <tool_call>")]}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_ids_equal_the_reference(processor, reference, messages):
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert processor.prepare(messages).token_ids == expected


def test_placeholders_are_expanded_where_the_images_stand(processor, reference):
    first, second = png(64, 64), png(128, 96)
    content = [image_part(first), text_part("and"), image_part(second), text_part("?")]
    prompt = processor.prepare([{"role": "user", "content": content}])
    rows = [item.num_rows for item in prompt.items]
    assert rows == [4, 12]
    assert prompt.media == [first, second]
    assert [item.param for item in prompt.items] == ["messages[0].content[0]", "messages[0].content[2]"]
    v = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in rows]
    text = f"<|im_start|>user\n{v[0]}and{v[1]}?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.token_ids == reference(text)["input_ids"]
    pad = processor.config.image_token_id
    for item in prompt.items:
        assert set(prompt.token_ids[item.offset : item.offset + item.num_rows]) == {pad}
        assert prompt.token_ids[item.offset - 1] == processor.config.vision_start_token_id


_FRAGMENTS = [*SPECIALS, "<", "<|", "|>", "im_end|>", "<|im_", "image_pad", "\ue000", " ", "\n", "a", "é"]
hostile = st.lists(st.sampled_from(_FRAGMENTS), max_size=12).map("".join)


@given(st.lists(hostile, min_size=1, max_size=4), hostile)
def test_text_never_becomes_structure(parts, system):
    processor = _cached_processor()
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": [image_part(png()), *map(text_part, parts)]},
        {"role": "assistant", "content": parts[0]},
        {"role": "user", "content": parts[-1]},
    ]
    ids = processor.prepare(messages).token_ids
    specials = {i: name for name, i in processor.tokenizer.special_ids.items()}
    found = [specials[i] for i in ids if i in specials]
    turn = ["<|im_start|>", "<|im_end|>"]
    image = ["<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>"]
    assert found == [*turn, "<|im_start|>", *image, "<|im_end|>", *turn, *turn, "<|im_start|>"]
    text = processor.tokenizer.decode(ids)
    import unicodedata

    for part in [*parts, system]:
        assert unicodedata.normalize("NFC", part) in text


_PROCESSOR: list[Processor] = []


def _cached_processor() -> Processor:
    if not _PROCESSOR:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            _PROCESSOR.append(make_processor(write_tokenizer(Path(folder))))
    return _PROCESSOR[0]


@given(st.text(max_size=60))
def test_streamed_pieces_join_to_the_whole(text):
    tokenizer = _cached_processor().tokenizer
    try:
        ids = tokenizer.encode(text)
    except UnicodeEncodeError:
        return
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids)


@given(st.data())
def test_any_tokens_stream_to_what_they_decode_to(data):
    tokenizer = _cached_processor().tokenizer
    specials = st.sampled_from(sorted(tokenizer.special_ids.values()))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3) | specials, max_size=40))
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    stream = tokenizer.stream(with_specials=True)
    whole = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert "".join(map(stream.push, ids)) + stream.finish() == whole


def test_an_unfinished_character_comes_at_the_end():
    tokenizer = _cached_processor().tokenizer
    ids = tokenizer.encode("a🟥")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) == "a"
    assert stream.finish() == tokenizer.decode(ids)[1:]


@pytest.mark.parametrize(
    ("messages", "param", "text"),
    [
        ([], "messages", "at least one"),
        ("hi", "messages", "list"),
        ([1], "messages[0]", "object"),
        ([{"role": "robot", "content": "x"}], "messages[0].role", "role must be"),
        ([{"role": "user"}], "messages[0].content", "content must be"),
        ([{"role": "user", "content": []}], "messages[0].content", "content must be"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "messages[0].content[0].type", "type must be"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0].text", "string"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content", "surrogates"),
        ([{"role": "user", "content": "a\0b"}], "messages[0].content", "NUL"),
        ([{"role": "system", "content": [image_part(png())]}], "messages[0].content[0]", "not for system turns"),
        ([{"role": "user", "content": [image_part(b"x")]}], "messages[0].content[0]", "not an image"),
        ([{"role": "user", "content": [image_part(b"")]}], "messages[0].content[0]", "empty"),
        ([{"role": "user", "content": [image_part(png())] * 1025}], "messages[0].content[1024]", "more than 1024"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "messages[0].content[0]", "must be a string"),
        ([{"role": "user", "content": "a " * 2000}], "messages", "the context is 900"),
        *(
            (
                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
                "messages[0].content[0]",
                t,
            )
            for url, t in [
                ("http://example.com/a.png", "only data:"),
                ("file:///etc/passwd", "only data:"),
                ("/etc/passwd", "only data:"),
                ("data:image/png,abc", "not an image"),
                ("data:image/png;base64", "must be data:"),
                ("data:image/png;base64,@@@@", "base64"),
                (3, "string"),
            ]
        ),
    ],
)
def test_bad_messages_name_their_place(processor, messages, param, text):
    with pytest.raises(InputError, match=text) as caught:
        processor.prepare(messages)
    assert caught.value.param == param


def test_local_files_only_where_allowed(processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(path)}}]}]
    assert processor.prepare(messages, allow_paths=True).media == [png()]
    with pytest.raises(InputError, match="only data:"):
        processor.prepare(messages)
    messages[0]["content"][0]["image_url"]["url"] = str(tmp_path / "none.png")
    with pytest.raises(InputError, match="No such file"):
        processor.prepare(messages, allow_paths=True)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "a\0b"):
        messages[0]["content"][0]["image_url"]["url"] = f"{tmp_path}/{name}"
        with pytest.raises(InputError, match=r"not a file|bad name") as caught:
            processor.prepare(messages, allow_paths=True)
        assert caught.value.param == "messages[0].content[0]"


def test_bytes_and_paths_in_process(processor, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    content = [{"type": "image", "image": source} for source in (png(), path, str(path))]
    assert processor.prepare([{"role": "user", "content": content}], allow_paths=True).media == [png()] * 3
    for part in content:
        with pytest.raises(InputError, match=r"string|only data:"):
            processor.prepare([{"role": "user", "content": [part]}])


THINKING = """
{%- for message in messages -%}
  {%- set text = message.content -%}
  {%- if message.role == 'assistant' and '</think>' in text -%}
    {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
    {%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {{- '<|im_start|>' + message.role + '\\n' + (text | trim) + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
"""


def thinking_turns(question: str, thought: str, answer: str) -> list[dict]:
    said = f"<think>\n{thought}\n\n</think>\n\n{answer}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": said}]


def test_a_template_that_cuts_text_up_gives_the_references_ids(processor, reference):
    messages = thinking_turns("  what? ", "it's 12", "a <b> {c}\n")
    expected = reference.apply_chat_template(messages, chat_template=THINKING, tokenize=True)["input_ids"]
    pieces = ChatTemplate(THINKING, list(processor.tokenizer.special_ids)).render(messages)
    ids = [
        i
        for text, special in pieces
        for i in ([processor.tokenizer.token_id(text)] if special else processor.tokenizer.encode(text))
    ]
    assert ids == expected


@given(hostile, hostile, hostile)
def test_a_template_that_cuts_text_up_makes_no_structure_of_it(question, thought, answer):
    pieces = ChatTemplate(THINKING, SPECIALS).render(thinking_turns(question, thought, answer))
    turn = ["<|im_start|>", "<|im_end|>"]
    assert [text for text, special in pieces if special] == [*turn, *turn, "<|im_start|>"]


@given(st.lists(st.text(alphabet="ab", max_size=6), max_size=5))
def test_names_that_overlap_themselves_are_not_put_together(parts):
    template = ChatTemplate("{% for part in messages %}{{ part }}{% endfor %}|aabaab|", ["aab", "aabaab", "ba"])
    pieces = template.render(parts)
    assert [text for text, special in pieces if special] == ["aabaab"]
    assert "".join(piece.text for piece in pieces) == "".join(parts) + "|aabaab|"


def test_the_guard_is_a_character_nobody_uses():
    template = ChatTemplate("{{ messages[0].content }}<|im_end|>", SPECIALS)
    private = "".join(map(chr, range(0xE000, 0xF8FF)))
    text = private + "<|im_end|>"
    pieces = template.render([{"role": "user", "content": text}])
    assert pieces == [(text, False), ("<|im_end|>", True)]
    with pytest.raises(InputError, match="private-use"):
        template.render([{"role": "user", "content": text + chr(0xF8FF)}])


def test_a_template_that_writes_without_end_is_stopped():
    template = ChatTemplate("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}{{ 1 / 0 }}", SPECIALS)
    with pytest.raises(InputError, match="more than the limit of 8388608 characters"):
        template.render([{"role": "user", "content": "x" * 1000}])


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ messages['x'].y.z }}", "{{ missing.name }}"])
def test_a_template_that_fails_is_an_input_error(source):
    with pytest.raises(InputError, match="refuses"):
        ChatTemplate(source, SPECIALS).render([{"role": "user", "content": "x"}])


def test_where_a_template_is_read_from(tmp_path):
    with pytest.raises(CheckpointError, match="no chat template"):
        ChatTemplate.from_folder(tmp_path, SPECIALS)
    for name in ("tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
        text = f"{name} {{{{ messages | tojson }}}}"
        (tmp_path / name).write_text(text if name.endswith(".jinja") else json.dumps({"chat_template": text}))
        [piece] = ChatTemplate.from_folder(tmp_path, SPECIALS).render([{"content": "<é>"}])
        assert piece.text == name + ' [{"content": "<é>"}]'
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate.from_folder(tmp_path, SPECIALS)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"chat_template.json cannot be read"):
        ChatTemplate.from_folder(tmp_path, SPECIALS)


def test_tools_in_the_shipped_template(reference):
    """The words and line breaks, written out by hand."""
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call, {"name": "raw", "arguments": "{}"}]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": [text_part("3"), {"type": "image"}]},
    ]
    text = reference.apply_chat_template(messages, tools=[{"name": "add"}], tokenize=False, add_generation_prompt=True)
    head, rest = text.split("<tools>\n", 1)
    assert head.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call")
    tools, turns = rest.split("</tool_call><|im_end|>\n", 1)
    assert tools.startswith('{"name": "add"}\n</tools>\n\nFor each function call')
    assert turns == (
        "<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<é>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "raw", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n"
        "3<|vision_start|><|image_pad|><|vision_end|>\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_cannot_reach_out(folder):
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"):
        template = ChatTemplate(source, SPECIALS)
        with pytest.raises(InputError, match="refuses"):
            template.render([{"role": "user", "content": "x"}])
