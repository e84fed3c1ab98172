"""Damaged folders, from the catalogue: refused at once, all that is wrong named, before any memory is taken."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from qwen3vl_disagg import LLM, cli
from qwen3vl_disagg.checkpoint import folder as folder_module
from qwen3vl_disagg.checkpoint.folder import Checkpoint
from qwen3vl_disagg.core.errors import CheckpointError
from tests.support import damaged
from tests.support.damaged import CASES, CONFIG, FILE, INDEX, NORM, PIXELS, SAMPLING, SHARDS, TOKENIZER
from tests.support.float8 import make_float8
from tests.support.weights import SMALLEST, write_smallest
from tools.make_checkpoint import write_small_tokenizer

MAX_SECONDS = 2.0
MAX_BYTES = 64 << 20


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    write_smallest(root / "single")
    write_smallest(root / "sharded", num_shards=3)
    write_smallest(root / "per_expert", layout="per_expert")
    make_float8(write_smallest(root / "float8"), (16, 24))
    write_small_tokenizer(root / "single", SMALLEST)
    for name in ("sharded", "per_expert", "float8"):
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (root / "single" / file).exists():
                shutil.copy(root / "single" / file, root / name)
    return root


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    """Neither mapped nor read."""

    def refuse(*_args, **_options):
        raise AssertionError("weights were touched")

    monkeypatch.setattr(folder_module, "safe_open", refuse)
    monkeypatch.setattr(Checkpoint, "read", refuse)


def peak_growth(start: int) -> int:
    return _memory("VmHWM") - start


def _memory(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def reset_peak() -> int:
    """Bytes of this process now, from where its peak counts again; the peak so far where the kernel allows no reset."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmHWM")


def matches(said: str, problem: str) -> bool:
    """`...` stands for anything, and anything may follow."""
    return re.match(".*".join(map(re.escape, said.split("..."))), problem, re.DOTALL) is not None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(bases, tmp_path, case):
    folder = tmp_path / "checkpoint"
    shutil.copytree(bases / case.base, folder)
    case.damage(folder)
    before, start = reset_peak(), time.process_time()
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, device="cpu")
    assert time.process_time() - start < MAX_SECONDS
    assert peak_growth(before) < MAX_BYTES
    assert str(folder) in str(caught.value)
    left = list(caught.value.problems)
    for said in case.said:
        found = next((problem for problem in left if matches(said, problem)), None)
        assert found is not None, (said, left)
        left.remove(found)
    assert left == []


def test_the_catalogue_is_no_less_than_it_was():
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


def test_sound_folders_are_not_refused(bases, monkeypatch):
    monkeypatch.undo()
    for base in bases.iterdir():
        LLM(base, device="cpu")


def test_everything_at_once(bases, tmp_path):
    """Config, shards, tensors, tokenizer, pixels and sampling, in one message; tensors where headers allow it."""
    folder = tmp_path / "sharded"
    shutil.copytree(bases / "sharded", folder)
    damaged.config(text_config__head_dim=...)(folder)
    damaged.gone(SHARDS[1])(folder)
    damaged.resize(SHARDS[2], -1)(folder)
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, device="cpu")
    found = [f"{CONFIG}: text_config.head_dim is missing", f"{INDEX}: {SHARDS[1]}: missing", f"{SHARDS[2]}: truncated"]
    assert all(matches(said, problem) for said, problem in zip(found, caught.value.problems, strict=True))
    folder = tmp_path / "single"
    shutil.copytree(bases / "single", folder)
    damaged.tensors(lambda held: (held.pop(NORM), held.pop("lm_head.weight")))(folder)
    for step in (damaged.gone(TOKENIZER), damaged.setting(PIXELS, patch_size=14), damaged.write(SAMPLING, b"")):
        step(folder)
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, device="cpu")
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        NORM,
        "lm_head.weight",
        f"{TOKENIZER} is missing",
        PIXELS,
        SAMPLING,
    }


@pytest.mark.parametrize("name", ["truncated", "pickled", "config with {'auto_map': {'AutoModel': 'evil.Model'}}"])
def test_the_command_says_it_and_ends_with_2(bases, tmp_path, monkeypatch, capsys, name):
    case = next(case for case in CASES if case.name == name)
    folder = tmp_path / "checkpoint"
    shutil.copytree(bases / case.base, folder)
    case.damage(folder)
    monkeypatch.setattr(sys, "argv", ["qwen3vl-disagg", "generate", "--model", str(folder), "--prompt", "Hello"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    first, *lines = err.splitlines()
    assert first == f"error: cannot use checkpoint {folder}: {len(case.said)} problem(s)"
    assert [line.startswith(f"  - {said}") for line, said in zip(lines, case.said, strict=True)] == [True] * len(lines)
    assert FILE in err or CONFIG in err or "pytorch_model.bin" in err
