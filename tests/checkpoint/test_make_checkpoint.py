"""The tool that writes random checkpoints, and the docstrings' examples."""

import doctest
import sys

import pytest
from tokenizers import Tokenizer

from qwen3vl_disagg.checkpoint import RANDOM_PRESETS, layouts, load_model, read_config
from qwen3vl_disagg.model.config import check_config
from tools import make_checkpoint


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", *map(str, args)])
    make_checkpoint.main()


def test_a_folder_that_loads(tmp_path, monkeypatch):
    run(monkeypatch, "--out", tmp_path, "--layout", "v5", "--num-shards", 2, "--text.num-experts", 12)
    config = read_config(tmp_path)
    assert config.text.num_experts == 12
    load_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.token_to_id("<|image_pad|>") == config.image_token_id
    assert tokenizer.token_to_id("<|vision_start|>") == config.vision_start_token_id
    assert tokenizer.get_vocab_size() <= config.text.vocab_size


def test_the_seed_decides(tmp_path, monkeypatch):
    weights = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run(monkeypatch, "--out", tmp_path / name, "--seed", seed, "--no-tokenizer")
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("args", [["--text.num-key-value-heads", "3"], ["--bogus", "1"], ["--preset", "30b-a3b"]])
def test_bad_arguments(tmp_path, monkeypatch, args):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--out", tmp_path / "out", *args)
    assert caught.value.code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RANDOM_PRESETS)
def test_presets_are_sound(name):
    assert check_config(RANDOM_PRESETS[name]) == []


def test_docstring_examples():
    results = doctest.testmod(layouts)
    assert results.attempted > 0
    assert results.failed == 0
