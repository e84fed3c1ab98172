"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.command import run_command as run
from tests.support.scenes import ask_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    ask_scenes(folder, seed=5, count=6)
    return folder


def questions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def test_plain_text_goes_to_stdout_and_all_else_to_stderr(scenes):
    asked = questions(scenes)[1]
    images = [word for name in asked["images"] for word in ("--image", str(scenes / name))]
    command = [sys.executable, "-m", "qwen3vl_disagg", "generate", *images, "--prompt", asked["question"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [expected] = LLM().chat([_messages(scenes, asked)])
    assert done.stdout == expected.text + "\n"
    for word in ("tokens/s", "memory", "prefill", "encode", "transfer"):
        assert word in done.stderr


def _messages(folder: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": str(folder / name)}} for name in asked["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": asked["question"]}]}]


def test_json_has_the_fields_of_the_contract(monkeypatch, capsys, scenes):
    asked = questions(scenes)[0]
    images = [word for name in asked["images"] for word in ("--image", str(scenes / name))]
    args = ["generate", *images, "--prompt", asked["question"], "--json", "--logprobs", "2", "--system", "Be brief."]
    status, out, _ = run(monkeypatch, capsys, *args)
    assert status == 0
    [line] = out.splitlines()
    answer = json.loads(line)
    assert {"text", "token_ids", "prompt_token_ids", "finish_reason", "usage", "timings", "logprobs"} == set(answer)
    assert answer["finish_reason"] == "stop"
    assert [entry["token_id"] for entry in answer["logprobs"]] == answer["token_ids"]
    for entry in answer["logprobs"]:
        assert set(entry) == {"token_id", "logprob", "top"}
        assert len(entry["top"]) == 2
        assert entry["top"][0] == [entry["token_id"], entry["logprob"]]  # greedy
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert usage["completion_tokens"] == len(answer["token_ids"])
    assert len(answer["timings"]["items"]) == len(asked["images"])


def test_a_batch_gives_one_line_for_each_line(monkeypatch, capsys, scenes):
    entries = questions(scenes)
    lines = [json.dumps({"images": e["images"], "prompt": e["question"]}) for e in entries[:3]]
    lines += [json.dumps({"messages": _messages(scenes, e)}) for e in entries[3:]]
    path = scenes / "batch.jsonl"
    path.write_text("\n".join(lines) + "\n")
    status, out, _ = run(monkeypatch, capsys, "generate", "--batch", str(path))
    assert status == 0
    expected = LLM().chat([_messages(scenes, e) for e in entries])
    assert [json.loads(line)["text"] for line in out.splitlines()] == [result.text for result in expected]


def test_a_bad_entry_of_a_batch_fails_alone(monkeypatch, capsys, scenes):
    good = questions(scenes)[0]
    broken = scenes / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    lines = [{"images": [broken.name], "prompt": "?"}, {"images": good["images"], "prompt": good["question"]}]
    path = scenes / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    status, out, err = run(monkeypatch, capsys, "generate", "--batch", str(path))
    assert status == 2
    first, second = map(json.loads, out.splitlines())
    assert first["error"]["param"] == "messages[0].content[0]"
    assert second["text"]
    assert "entry 1" in err


def test_what_is_missing_of_a_file_is_said(monkeypatch, capsys, tmp_path):
    path = tmp_path / "cut.jpg"
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:-2])
    args = ("--image", str(path), "--prompt", "?", "--max-new-tokens", "1")
    status, out, err = run(monkeypatch, capsys, "generate", *args, "--json")
    assert status == 0
    [item] = json.loads(out)["timings"]["items"]
    assert "lacks its end" in item["note"]
    assert f"note: image or clip 1: {item['note']}" in err
    assert "note: image or clip 1: the file lacks its end" in run(monkeypatch, capsys, "generate", *args)[2]


def test_ignore_eos_gives_exactly_that_many_tokens(monkeypatch, capsys):
    args = ["generate", "--prompt", "hi", "--ignore-eos", "--max-new-tokens", "9", "--json"]
    status, out, _ = run(monkeypatch, capsys, *args)
    assert status == 0
    answer = json.loads(out)
    assert len(answer["token_ids"]) == 9
    assert answer["finish_reason"] == "length"


def test_a_seed_repeats_itself(monkeypatch, capsys):
    args = ["generate", "--prompt", "hi", "--temperature", "1.5", "--seed", "4", "--max-new-tokens", "12", "--json"]
    answers = [json.loads(run(monkeypatch, capsys, *args)[1])["token_ids"] for _ in range(2)]
    assert answers[0] == answers[1]


def test_the_samplers_options(monkeypatch, capsys, scenes):
    asked = questions(scenes)[0]
    [plain] = LLM().chat([_messages(scenes, asked)])
    images = [word for name in asked["images"] for word in ("--image", str(scenes / name))]
    args = ["generate", *images, "--prompt", asked["question"]]
    stop = plain.text[1:3]
    status, out, _ = run(monkeypatch, capsys, *args, "--stop", "zzz", "--stop", stop, "--json")
    assert status == 0
    answer = json.loads(out)
    assert (answer["text"], answer["finish_reason"]) == (plain.text[:1], "stop")
    assert run(monkeypatch, capsys, *args, "--stop", stop)[1] == plain.text[:1] + "\n"
    many = str(len(plain.token_ids) + 3)
    _, out, _ = run(monkeypatch, capsys, *args, "--min-tokens", many, "--json")
    assert len(json.loads(out)["token_ids"]) >= len(plain.token_ids) + 3
    args += ["--temperature", "1.5", "--min-p", "1", "--presence-penalty", "0", "--frequency-penalty", "0"]
    _, out, _ = run(monkeypatch, capsys, *args, "--repetition-penalty", "1", "--json")
    assert json.loads(out)["token_ids"] == plain.token_ids  # min-p 1 leaves the most likely one
    _, out, _ = run(monkeypatch, capsys, *args, "--repetition-penalty", "9", "--json")
    assert json.loads(out)["token_ids"] != plain.token_ids


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--prompt", "a", "--min-p", "2"], "min_p must be a number from 0 to 1"),
        (["generate", "--prompt", "a", "--presence-penalty", "3"], "presence_penalty must be"),
        (["generate", "--prompt", "a", "--frequency-penalty", "-3"], "frequency_penalty must be"),
        (["generate", "--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty must be"),
        (["generate", "--prompt", "a", "--min-tokens", "200"], "min_tokens is 200, but only 128"),
        (["generate", "--prompt", "a", "--stop", ""], "stop takes up to"),
        (["generate"], "exactly one of --prompt, --messages and --batch"),
        (["generate", "--prompt", "a", "--batch", "b"], "exactly one of"),
        (["generate", "--prompt", "a", "--no-such-option"], "no-such-option"),
        (["generate", "--prompt", "a", "--temperature", "hot"], "temperature"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "temperature must be a number from 0"),
        (["generate", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["generate", "--prompt", "a", "--max-new-tokens", "99999"], "longer than the context"),
        (["generate", "--prompt", "a", "--image", "/no/such.png"], "No such file"),
        (["generate", "--prompt", "a", "--video", "v.mp4"], "No such file"),
        (["generate", "--prompt", "a", "--model", "/no/such/folder"], "no such folder"),
        (["generate", "--prompt", "a", "--model", "Qwen/no such name"], "no possible ORG/NAME"),
        (["generate", "--prompt", "a", "--quantize", "float4"], "float4"),
        (["generate", "--prompt", "a", "--device", "cuda"], "no CUDA device"),
        (["generate", "--messages", "/no/such.json"], "No such file"),
        (["plan", "--gpus", "1"], "1 ranks: must be 2"),
        (["dance"], "dance"),
        ([], ""),
    ],
)
def test_bad_arguments_exit_with_two_and_no_traceback(monkeypatch, capsys, args, message):
    import torch

    if "cuda" in args and torch.cuda.is_available():  # then it is a good one
        pytest.skip("--device cuda is a bad argument only where there is no CUDA device")
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_conversation_from_a_file(monkeypatch, capsys, tmp_path):
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": "hi"}]))
    status, out, _ = run(monkeypatch, capsys, "generate", "--messages", str(path), "--json")
    assert status == 0
    [expected] = LLM().chat([[{"role": "user", "content": "hi"}]], SamplingParams(max_new_tokens=128))
    assert json.loads(out)["token_ids"] == expected.token_ids
    for text in ("{not json", "[" * 100_000):
        path.write_text(text)
        status, _, err = run(monkeypatch, capsys, "generate", "--messages", str(path))
        assert status == 2
        assert "not JSON" in err
        assert len(err.splitlines()) == 1
