"""Checkpoints in float16: run in bfloat16 or float32 when that is asked for, else refused in a line that says how."""

from __future__ import annotations

import shutil

import pytest
import torch

from qwen3vl_disagg import LLM, cli
from qwen3vl_disagg.checkpoint import load_language_model, load_vision_model
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.weights import edit_json, edit_tensors

REASON = "the checkpoint is float16, in which nothing is run here: give --dtype float32 or --dtype bfloat16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    copy = tmp_path_factory.mktemp("float16") / "tiny"
    shutil.copytree(resolve_model_folder(None), copy)
    edit_tensors(copy, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    edit_json(copy, lambda config: config.update(dtype="float16"))
    return copy


def test_it_runs_in_what_is_asked_for(folder):
    question = [[{"role": "user", "content": "Which shape is left?"}]]
    sampling = SamplingParams(max_new_tokens=4)
    [expected] = LLM().chat(question, sampling)
    for dtype in ("float32", "bfloat16"):
        [answer] = LLM(folder, dtype=dtype).chat(question, sampling)
        assert answer.text == expected.text


def test_without_that_it_is_refused(folder, monkeypatch, capsys):
    for use in (LLM, load_language_model, load_vision_model):
        with pytest.raises(InputError, match=REASON) as caught:
            use(folder)
        assert caught.value.param == "dtype"
    for command in (("generate", "--prompt", "hi"), ("convert", "--out", str(folder.parent / "out"))):
        monkeypatch.setattr("sys.argv", ["qwen3vl-disagg", *command, "--model", str(folder)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert REASON in capsys.readouterr().err


def test_it_is_converted_to_what_is_asked_for(folder, tmp_path, monkeypatch):
    args = ["convert", "--model", str(folder), "--out", str(tmp_path / "new"), "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["qwen3vl-disagg", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    loaded = load_language_model(tmp_path / "new")
    expected = load_language_model(folder, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
