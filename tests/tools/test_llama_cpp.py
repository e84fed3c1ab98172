"""llama.cpp as a contestant: without a build, its command, its converter's stand-ins, and its server's answers."""

from __future__ import annotations

import json
import stat
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from tools.bench_contestants.llama_build import (
    NO_BUILD,
    LlamaBuildError,
    command,
    convert,
    named_build,
    source,
    tower_seconds,
)
from tools.bench_contestants.llama_convert import splits_as_qwen2
from tools.bench_contestants.llama_cpp import LlamaCpp
from tools.bench_contestants.worker import Setup
from tools.bench_engine import gather, make_folder
from tools.bench_road import command_of, llama_command

CONVERTER = """
import json, sys
from pathlib import Path
from conversion.base import TextModel

def main():
    out = Path(sys.argv[sys.argv.index("--outfile") + 1])
    named = None if "--mmproj" in sys.argv else TextModel().get_vocab_base_pre(None)
    out.write_text(json.dumps([sys.argv[1:4], named]))
"""
BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("not recognized")
"""
SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def say(self, *parts):
        self.send_response(200)
        self.end_headers()
        for part in parts:
            self.wfile.write(part.encode())

    def do_GET(self):
        self.say(json.dumps({{"build_info": "b1"}}))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "messages" in asked:
            print("0.59.900.000 I slot: encoding mtmd batch from idx = 2, n_chunks = 1", flush=True)
            print("1.00.150.500 I decoding image batch 1/1, n_tokens_batch = 4", flush=True)
            return self.say("{{}}")
        assert asked["ignore_eos"] and asked["stream"] and not asked["cache_prompt"]
        counts = [n for n in (1, 3, asked["n_predict"]) if n <= asked["n_predict"]]
        events = [(i, n) for n in counts for i in range(len(asked["prompt"]))]
        if asked["prompt"][0][0] == 9:
            return self.say('data: {{"error": {{"message": "too long"}}}}\\n\\n')
        self.say(*("data: " + json.dumps({{"index": i, "tokens_predicted": n}}) + "\\n\\n" for i, n in events))

assert sys.argv[sys.argv.index("--parallel") + 1] == "2"
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def build(tmp_path):
    """A folder like one in which llama.cpp was built, with stand-ins for what is called of it."""
    folder, origin = tmp_path / "build", tmp_path / "source"
    (folder / "bin").mkdir(parents=True)
    (origin / "conversion").mkdir(parents=True)
    (folder / "CMakeCache.txt").write_text(f"A:B=C\nCMAKE_HOME_DIRECTORY:INTERNAL={origin}\n")
    (origin / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (origin / "conversion" / "base.py").write_text(BASE)
    program = folder / "bin" / "llama-server"
    program.write_text(SERVER.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    make_folder("tiny-random", folder)
    return folder


def test_without_a_build_the_row_is_left_out(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert named_build(None) is None
    with ExitStack() as stack:
        found = gather(stack, ["llama.cpp"], Setup(folder="x"), None, "default")
    assert found == ({}, {}, {"llama.cpp": NO_BUILD})
    monkeypatch.setenv("LLAMA_CPP", "/some/build")
    assert named_build(None) == Path("/some/build")
    assert named_build(Path("/other")) == Path("/other")


def test_what_is_no_build_is_said(tmp_path, build):
    with pytest.raises(LlamaBuildError, match="no bin/llama-server"):
        command(tmp_path, tmp_path, 1, 1, 1)
    with pytest.raises(LlamaBuildError, match="names no source"):
        source(tmp_path)
    (tmp_path / "source" / "convert_hf_to_gguf.py").unlink()
    with pytest.raises(LlamaBuildError, match="names no source"):
        source(build)


def test_the_road_s_command_is_split_as_it_was_joined(tmp_path, build, checkpoint):
    with ExitStack() as stack:
        line = llama_command(stack, build, checkpoint, 12, 100)
        words = command_of("llama.cpp", {"llama.cpp": line}, 81, Path("unused"))
        options = dict(pairwise(words))
        assert words[0] == str(build / "bin" / "llama-server")
        assert (options["--port"], options["--parallel"], options["--ctx-size"]) == ("81", "12", "1200")
        assert all(Path(options[name]).is_file() for name in ("--model", "--mmproj"))
    assert not Path(options["--model"]).exists()


def test_the_converter_gets_the_dtype_and_the_name_of_the_split(tmp_path, build, checkpoint):
    convert(build, checkpoint, tmp_path)
    assert json.loads((tmp_path / "model.gguf").read_text()) == [[str(checkpoint), "--outtype", "f32"], "qwen2"]
    assert json.loads((tmp_path / "mmproj.gguf").read_text())[1] is None


def test_a_tokenizer_that_splits_otherwise_stays_unknown(tmp_path, build, checkpoint):
    file = checkpoint / "tokenizer.json"
    assert splits_as_qwen2(checkpoint)
    file.write_text(file.read_text().replace("'ll|'d)", "'ll)"))
    assert not splits_as_qwen2(checkpoint)
    with pytest.raises(LlamaBuildError, match=r"was not converted[^\0]*NotImplementedError: not recognized"):
        convert(build, checkpoint, tmp_path)


def test_a_server_is_asked_for_every_measurement(build, checkpoint):
    contestant = LlamaCpp(Setup(folder=str(checkpoint), max_batch=2, llama_cpp=str(build)))
    try:
        assert contestant.facts() == {"llama.cpp": "b1"}
        stamps = contestant.decode([[1, 2], [3, 4]], 5)
        assert [len(times) for times in stamps] == [5, 5]
        assert all(times == sorted(times) and times[1] == times[2] for times in stamps)
        assert contestant.prefill([1, 2, 3]) > 0
        assert contestant.vision((1, 4, 4), 6 * 16 * 16, 0) == pytest.approx(0.2505)
        with pytest.raises(RuntimeError, match="too long"):
            contestant.decode([[9]], 5)
    finally:
        contestant.close()


def test_a_server_that_does_not_come_up_says_its_last_words(build, checkpoint):
    (build / "bin" / "llama-server").write_text("#!/bin/sh\necho no such option; exit 1\n")
    with pytest.raises(LlamaBuildError, match="not ready:\nno such option"):
        LlamaCpp(Setup(folder=str(checkpoint), llama_cpp=str(build)))


@pytest.mark.parametrize("change", [{"is_random": True}, {"device": "cuda"}])
def test_only_folders_on_the_cpu(change):
    with pytest.raises(LlamaBuildError, match="on the CPU"):
        LlamaCpp(Setup(folder="x", **change))


def test_the_tower_s_time_is_between_two_lines_of_the_log():
    encode, decode = "I slot 0: encoding mtmd batch from idx = 2", "I decoding image batch 1/1"
    assert tower_seconds(f"0.01.000.250 {encode}\nnoise\n0.01.300.750 {decode}\n0.02.000.000 {decode}") == [
        pytest.approx(0.3005)
    ]
    assert tower_seconds(f"0.01.000.000 {encode}\n") == []
