"""recipes/encode.py before it forks: what ends it, and in how many words."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.cluster.slots import EXIT_GONE
from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.launch import join, worker
from qwen3vl_disagg.transport.addresses import Unreachable


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


def test_a_network_that_comes_late_is_waited_for(monkeypatch, capsys):
    """The line is one, however often it is tried; then the rank starts."""
    tries = iter([Unreachable("no way to 192.0.2.1 (Network is unreachable); give --address")] * 3)

    def own_address(option, hub):
        for error in tries:
            raise error
        return "127.0.0.1"

    class Started:
        def __init__(self, children):
            assert [child.name for child in children] == ["encode rank"]

        def run(self):
            return 0

    monkeypatch.setattr(join, "own_address", own_address)
    monkeypatch.setattr(join, "PAUSE_S", 0.01)
    monkeypatch.setattr(join, "Slot", Started)
    status, err = ended(resolve_model_folder(None), monkeypatch, capsys)
    assert status == 0
    assert err == "no way to 192.0.2.1 (Network is unreachable); give --address; trying again for 120 s\n"


def test_a_network_that_does_not_come_ends_it_like_a_hub_that_is_gone(monkeypatch, capsys):
    def own_address(option, hub):
        raise Unreachable("no way to 192.0.2.1 (Network is unreachable)")

    monkeypatch.setattr(join, "own_address", own_address)
    monkeypatch.setattr(join, "JOIN_S", 0.05)
    monkeypatch.setattr(join, "PAUSE_S", 0.01)
    status, err = ended(resolve_model_folder(None), monkeypatch, capsys)
    assert status == EXIT_GONE
    assert err.splitlines()[1:] == ["error: slot 0: no way to 192.0.2.1 (Network is unreachable), for 0.05 s"]


def test_other_failures_are_one_line(monkeypatch, capsys):
    def fail(model, world):
        raise DisaggError("--model a/b: the process that fetched it died")

    monkeypatch.setattr(join, "shared_model_folder", fail)
    assert ended("a/b", monkeypatch, capsys) == (1, "error: slot 0: --model a/b: the process that fetched it died\n")
