"""recipes/encode.py before it forks: what ends it, and in how many words."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.launch import join, worker


def ended(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encode.py", "--join", "127.0.0.1:9", "--token", "t", "--model", str(model)])
    status = worker.join()
    said = capsys.readouterr()
    assert said.out == ""
    return status, said.err


def test_small_files_are_checked_before_any_rank_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(join, "Slot", lambda *_: pytest.fail("started"))
    folder = shutil.copytree(resolve_model_folder(None), tmp_path / "checkpoint")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "patch_size": 14}))
    (folder / "tokenizer.json").unlink()
    status, err = ended(folder, monkeypatch, capsys)
    assert status == 2
    first, *problems = err.splitlines()
    assert first == f"error: cannot use checkpoint {folder}: 2 problem(s)"
    assert sorted(problem.split()[1] for problem in problems) == ["preprocessor_config.json:", "tokenizer.json"]


def test_other_failures_are_one_line(monkeypatch, capsys):
    def fail(model, world):
        raise DisaggError("--model a/b: the process that fetched it died")

    monkeypatch.setattr(join, "shared_model_folder", fail)
    assert ended("a/b", monkeypatch, capsys) == (1, "error: slot 0: --model a/b: the process that fetched it died\n")
