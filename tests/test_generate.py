"""`generate`: what is refused before the weights are read, and how the lines of --batch come and stay."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import tyro

from qwen3vl_disagg import cli, generate
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.sampling_params import OPTIONS, SamplingParams
from qwen3vl_disagg.llm.llm import LLM
from qwen3vl_disagg.options import GenerateOptions
from qwen3vl_disagg.processing import GenerationDefaults


def run(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `qwen3vl-disagg generate *args`, in this process."""
    monkeypatch.setattr(sys, "argv", ["qwen3vl-disagg", "generate", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def no_model(monkeypatch) -> None:
    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(LLM, "__init__", load)


# ---- before the weights ----


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prompt", "a", "--image", "no.png"], "--image no.png: No such file"),
        (["--prompt", "a", "--image", "."], "--image .: Is a directory"),
        (["--prompt", "a", "--image", ""], "No such file"),
        (["--prompt", "a", "--image", "a\0b"], "null"),
        (["--prompt", "a", "--video", "no.mp4"], "--video no.mp4: No such file"),
        (["--prompt", "a", "--image", "https://example.com/a.png"], "https://example.com/a.png: nothing is fetched"),
        (["--messages", "no.json"], "no.json: No such file"),
        (["--messages", "media.json"], "messages[1].content[1]: no.png: No such file"),
        (["--messages", "remote.json"], "messages[0].content[0]: http://a/b.png: nothing is fetched"),
        (["--tools", "no.json", "--prompt", "a"], "no.json: No such file"),
        (["--json-schema", "no.json", "--prompt", "a"], "no.json: No such file"),
        (["--batch", "no.jsonl"], "no.jsonl: No such file"),
        (["--batch", "."], "Is a directory"),
        (["--batch", "bad.jsonl"], "bad.jsonl, line 3: not JSON"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["--prompt", "a", "--min-tokens", "9", "--max-new-tokens", "4"], "min_tokens is 9"),
        (["--prompt", "a", "--stop", ""], "stop takes"),
        (["--prompt", "a", "--logprobs", "99"], "logprobs must be"),
    ],
)
def test_what_can_be_seen_to_be_wrong_is_said_before_the_weights_are_read(monkeypatch, capsys, tmp_path, args, words):
    monkeypatch.chdir(tmp_path)
    media = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "no.png"}}]
    (tmp_path / "media.json").write_text(
        json.dumps([{"role": "user", "content": "a"}, {"role": "user", "content": media}])
    )
    remote = [{"type": "image_url", "image_url": "http://a/b.png"}]
    (tmp_path / "remote.json").write_text(json.dumps([{"role": "user", "content": remote}]))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n')
    status, out, err = run(monkeypatch, capsys, *args)
    assert (status, out) == (2, "")
    [line] = err.splitlines()
    assert words in line


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["Q3VL_KERNELS", "Q3VL_GRAPHS", "Q3VL_FAULT"])
def test_a_variable_that_means_nothing_is_refused(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "maybe")
    status, out, err = run(monkeypatch, capsys, "--prompt", "a")
    assert (status, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith(f"error: {name}: {name}=maybe: must be ")


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.flag is not None])
def test_a_flag_gives_its_option(name):
    example, flag = OPTIONS[name].example, f"--{name.replace('_', '-')}"
    values = (
        [[]] if example is True else [[str(value)] for value in (example if isinstance(example, list) else [example])]
    )
    options = tyro.cli(GenerateOptions, args=["--prompt", "a", *(word for value in values for word in (flag, *value))])
    defaults = GenerationDefaults(frozenset())
    assert generate.sampling_of(options, defaults) == defaults.sampling(**{"max_new_tokens": 128, name: example})
    assert generate.sampling_of(GenerateOptions(prompt="a"), defaults) == SamplingParams()


def test_help_does_not_wait_for_torch():
    code = """
import sys
from qwen3vl_disagg import cli
for command in ("", "generate", "plan", "convert", "faults", "version"):
    sys.argv = ["qwen3vl-disagg", *filter(None, [command]), "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 0, end.code
for args in (["generate", "--no-such-option"], ["generate", "--temperature", "hot"], ["dance"], []):
    sys.argv = ["qwen3vl-disagg", *args]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 2, end.code
from recipes import encode, serve
for recipe in (serve, encode):
    for args, status in ((["--help"], 0), (["--no-such-option"], 2)):
        sys.argv = ["recipe", *args]
        assert recipe.main() == status
slow = {"torch", "numpy", "tokenizers", "jinja2", "PIL"} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- lines of --batch ----


def entries(tmp_path: Path, *lines: str | bytes) -> list:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return list(generate.conversations(GenerateOptions(batch=path)))


def urls(conversation: list) -> list[str]:
    parts = conversation[-1]["content"]
    return [part[part["type"]]["url"] for part in parts if part["type"] != "text"]


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"images": ["a.png", "b.png"]}, ["{}/a.png", "{}/b.png"]),
        ({"images": "a.png"}, ["{}/a.png"]),
        ({"image": "a.png"}, ["{}/a.png"]),
        ({"image": ["a.png"]}, ["{}/a.png"]),
        ({"image": "/b/a.png", "video": "c.mp4"}, ["/b/a.png", "{}/c.mp4"]),
        ({"videos": ["c.mp4"], "images": None}, ["{}/c.mp4"]),
        ({"image": "data:image/png;base64,//8="}, ["data:image/png;base64,//8="]),
        ({"image": "file:///a.png"}, ["file:///a.png"]),
        ({"image": "https://a/b.png"}, ["https://a/b.png"]),  # refused when it is prepared, by its line
        ({}, []),
    ],
)
def test_media_of_a_line(tmp_path, entry, found):
    [conversation] = entries(tmp_path, json.dumps({"prompt": "?", **entry}))
    assert urls(conversation) == [url.format(tmp_path) for url in found]
    assert conversation[-1]["content"][-1] == {"type": "text", "text": "?"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "temperature": 0}', "`temperature` is not known; there are messages, prompt, system"),
        ('{"prompt": "a", "imgs": []}', "`imgs` is not known"),
        ('{"prompt": "a", "' + "x" * 999 + '": 1}', "`" + "x" * 64 + "` is not known"),
        ('{"prompt": "a", "image": "a", "images": []}', "`images` is given twice"),
        ('{"messages": [], "images": ["a.png"]}', "`messages` goes with nothing else"),
        ('{"messages": [], "prompt": "a"}', "`messages` goes with nothing else"),
        ('{"images": ["a.png"]}', "needs `messages`, or `prompt`"),
        ('{"prompt": 5}', "needs `messages`, or `prompt`"),
        ('{"prompt": "a", "system": 5}', "`system` must be a string"),
        ('{"prompt": "a", "image": 5}', "`images` must be a file name, or a list of them"),
        ('{"prompt": "a", "videos": [5]}', "`videos` must be a file name, or a list of them"),
        ("[]", "must be an object"),
        ("5", "must be an object"),
        ("{", "not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "not JSON: 'prompt' is given twice"),
        ('{"messages": [{"role": "user", "content": "a", "role": "user"}]}', "not JSON: 'role' is given twice"),
        ('{"prompt": NaN}', "not JSON: NaN is not JSON"),
        (b"\xff", "not JSON"),
        ("[" * 99999, "not JSON: nested too deeply"),
    ],
)
def test_a_line_that_says_something_else_is_refused_by_name(tmp_path, line, words):
    with pytest.raises(InputError) as caught:
        entries(tmp_path, '{"prompt": "a"}', "", line)
    assert str(caught.value).startswith(f"{tmp_path / 'batch.jsonl'}, line 3: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_lines_end_at_line_feeds_alone(tmp_path):
    found = entries(tmp_path, b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r', b"  ", b'{"prompt": "c\\r\\nd"}', b"")
    assert [conversation[-1]["content"][-1]["text"] for conversation in found] == ["a\u2028b", "c\r\nd"]


def test_a_line_is_not_endless(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "_MAX_LINE", 100)
    with pytest.raises(InputError, match="line 2: longer than 100 bytes"):
        entries(tmp_path, '{"prompt": "a"}', json.dumps({"prompt": "a" * 99}))


def test_a_file_is_read_a_line_at_a_time(tmp_path):
    path = tmp_path / "batch.jsonl"
    line = json.dumps({"prompt": "?", "image": "data:image/png;base64," + "A" * 2**20}) + "\n"
    path.write_text(line * 40)
    tracemalloc.start()
    try:
        count = sum(1 for _ in generate.conversations(GenerateOptions(batch=path)))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert count == 40


def test_answers_are_written_in_order_while_later_lines_are_not_read_yet(monkeypatch, capsys, tmp_path):
    path = tmp_path / "batch.jsonl"
    lines = [json.dumps({"prompt": f"{n}", **({"image": "no.png"} if n == 70 else {})}) for n in range(150)]
    path.write_text("\n".join(lines))
    events: list[str] = []
    entry, write = generate._entry, generate.Printer.json
    monkeypatch.setattr(generate, "_entry", lambda *args: events.append("read") or entry(*args))
    monkeypatch.setattr(generate.Printer, "json", lambda *args: events.append("written") or write(*args))
    status, out, err = run(monkeypatch, capsys, "--batch", str(path), "--max-new-tokens", "2")
    assert status == 2
    results = [json.loads(line) for line in out.splitlines()]
    assert [n for n, result in enumerate(results) if "error" in result] == [70]
    assert "no.png" in results[70]["error"]["message"] or "No such file" in results[70]["error"]["message"]
    assert len(results) == events.count("written") == 150
    assert "entry 71" in err
    first = events.index("written")
    assert events[:first].count("read") < 150 + 70  # once for the check, and a window of answers
    ahead = [events[:n].count("read") - 150 - events[:n].count("written") for n in range(first, len(events))]
    assert max(ahead) <= 70


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("closed", 1, marks=pytest.mark.slow),
    ],
)
def test_what_was_written_stays(tmp_path, how, status):
    path = tmp_path / "batch.jsonl"
    path.write_text('{"prompt": "hi"}\n' * 400)
    command = [sys.executable, "-m", "qwen3vl_disagg", "generate", "--batch", str(path), "--max-new-tokens", "30"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first, rest = process.stdout.readline(), b""
    if how == "closed":
        process.stdout.close()
    else:
        process.send_signal(how)
        rest = process.stdout.read()
    err = process.stderr.read()
    process.wait(60)
    assert process.returncode == status, err
    assert b"Traceback" not in err
    assert b"Exception" not in err
    lines = (first + rest).splitlines(keepends=True)
    assert 1 <= len(lines) < 400
    assert all(line.endswith(b"\n") and json.loads(line)["text"] for line in lines)


GENERATE = ["-m", "qwen3vl_disagg", "generate", "--prompt", "hi", "--ignore-eos", "--max-new-tokens", "900"]


@pytest.mark.parametrize(
    ("command", "sign"),
    [
        (GENERATE, "libtorch"),
        (["recipes/serve.py", "--port", "0"], "libtorch"),
        pytest.param(GENERATE, "model ", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_is_quiet(command, sign):
    """While torch is imported, and while an answer is made."""
    command = [sys.executable, *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    end, said = time.monotonic() + 60, b""
    if sign == "libtorch":
        while sign not in Path(f"/proc/{process.pid}/maps").read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
    else:
        while not said.startswith(b"model "):
            said = process.stderr.readline()
            assert said
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not re.search(rb"Traceback|Exception|Error", err), err
    assert err == b"" or sign != "libtorch"


def test_what_a_terminal_cannot_show_ends_nothing(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "qwen3vl_disagg", "generate", "--messages", "no-\u4e2d.json"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == b"error: no-\\u4e2d.json: No such file or directory\n"


def test_null_in_a_line_of_a_batch_is_nothing(tmp_path):
    """As tables write columns that a row does not have."""
    batch = tmp_path / "batch.jsonl"
    turns = [{"role": "user", "content": "?"}]
    lines = [
        {"prompt": "?", "image": None, "images": ["a.png"], "messages": None, "system": None},
        {"prompt": None, "images": None, "messages": turns},
    ]
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = generate.conversations(GenerateOptions(batch=batch))
    assert [part["type"] for part in first[0]["content"]] == ["image_url", "text"]
    assert second == turns
    batch.write_text(json.dumps({"prompt": None, "messages": None}))
    with pytest.raises(InputError, match="line 1: needs"):
        list(generate.conversations(GenerateOptions(batch=batch)))
