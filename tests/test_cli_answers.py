"""Reasoning and tools through `generate` and `LLM`: where each part of an answer goes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from qwen3vl_disagg import LLM, assets, cli
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing.answer_parts import FunctionCall, ToolCall
from tools.training.make_tokenizer import write_template

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASK = [{"role": "user", "content": "what is it?"}]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> Path:
    """The small checkpoint, made to think first. Nothing taught it to end that."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(Path(assets.__file__).parent / "tiny", folder)
    write_template(folder, thinking=True)
    return folder


def run(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["qwen3vl-disagg", "generate", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_what_is_thought_goes_to_stderr(monkeypatch, capsys, thinking):
    args = ["--model", str(thinking), "--prompt", "what is it?", "--max-new-tokens", "5"]
    status, out, _ = run(monkeypatch, capsys, *args, "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["text"] == ""
    assert answer["reasoning_content"]
    tokenizer = LLM(thinking).processor.tokenizer
    assert tokenizer.decode(answer["token_ids"]).strip("\n") == answer["reasoning_content"]
    assert tokenizer.decode(answer["prompt_token_ids"]).endswith("assistant\n<think>\n")
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, out) == (0, "\n")
    assert answer["reasoning_content"] + "\n" in err


def test_reasoning_and_text_come_to_callbacks_of_their_own():
    llm = LLM()
    tokenizer = llm.processor.tokenizer
    think, end = tokenizer.encode("<think>")[0], tokenizer.encode("</think>")[0]
    told: list[tuple[str, str]] = []
    sampling = llm.processor.generation.sampling(max_new_tokens=3, logit_bias={think: 100})
    callbacks = {f"on_{kind}": lambda i, piece, kind=kind: told.append((kind, piece)) for kind in ("text", "reasoning")}
    [result] = llm.chat([ASK], sampling, **callbacks)
    assert result.token_ids == [think] * 3, "the bias must win"
    assert (result.text, result.reasoning_content, result.finish_reason) == ("", "<think>" * 2, "length")
    assert told == [("reasoning", "<think>")] * 2
    told.clear()
    sampling = llm.processor.generation.sampling(max_new_tokens=3, logit_bias={end: 100})
    [result] = llm.chat([ASK], sampling, **callbacks)
    assert (result.text, result.reasoning_content) == ("</think>" * 3, None)
    assert {kind for kind, _ in told} == {"text"}
    assert "reasoning_content" not in result.to_dict()


def test_tools_are_shown_to_the_model(monkeypatch, capsys, tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([ADD]))
    status, out, _ = run(
        monkeypatch, capsys, "--prompt", "add", "--tools", str(path), "--max-new-tokens", "2", "--json"
    )
    assert status == 0
    llm = LLM()
    shown = llm.processor.tokenizer.decode(json.loads(out)["prompt_token_ids"])
    assert f"<tools>\n{json.dumps(ADD)}\n</tools>" in shown
    sampling = llm.processor.generation.sampling(max_new_tokens=2)
    [result] = llm.chat([[{"role": "user", "content": [{"type": "text", "text": "add"}]}]], sampling, tools=[ADD])
    assert result.to_dict()["prompt_token_ids"] == json.loads(out)["prompt_token_ids"]
    with pytest.raises(InputError, match="1 to 64"):
        llm.chat([ASK], tools=[{"type": "function", "function": {"name": "a b"}}])


def test_answers_keep_to_a_schema(monkeypatch, capsys, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"enum": ["red", "blue"]}))
    status, out, _ = run(monkeypatch, capsys, "--prompt", "add", "--json-schema", str(path))
    assert status == 0
    assert json.loads(out) in ("red", "blue")
    path.write_text('{"not": {}}')
    status, out, err = run(monkeypatch, capsys, "--prompt", "add", "--json-schema", str(path))
    assert (status, out) == (2, "")
    assert "error: --json-schema: the grammar cannot be used" in err
    grammar = Grammar.of_choice(["red", "blue"])
    [result] = LLM().chat([ASK], SamplingParams(grammar=grammar, temperature=1.0, seed=2))
    assert result.text in ("red", "blue")
    assert result.finish_reason == "stop"


@pytest.mark.parametrize(("text", "lines"), [("", []), ("I add.", ["I add."])])
def test_calls_are_lines_of_json_after_the_text(monkeypatch, capsys, text, lines):
    llm = LLM()
    [result] = llm.chat([ASK], llm.processor.generation.sampling(max_new_tokens=1))
    result.text = text
    result.tool_calls = [ToolCall(id="call_1", function=FunctionCall(name="add", arguments='{"a": 1}'))] * 2

    def answer(self, conversations, sampling, *, on_text, **_):
        if text:
            on_text(0, text)
        return [result]

    monkeypatch.setattr(LLM, "chat_iter", answer)
    status, out, _ = run(monkeypatch, capsys, "--prompt", "add")
    call = json.dumps({"name": "add", "arguments": '{"a": 1}'}, separators=(",", ":"))
    assert (status, out.splitlines()) == (0, [*lines, call, call])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"type": "function"}', "tools must be a list"),
        ('[{"type": "function"}]', r"tools\[0\].function: function must be an object"),
        (None, "No such file"),
    ],
)
def test_bad_tools_are_one_line(monkeypatch, capsys, tmp_path, text, message):
    path = tmp_path / "tools.json"
    if text is not None:
        path.write_text(text)
    status, out, err = run(monkeypatch, capsys, "--prompt", "add", "--tools", str(path))
    assert (status, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
