"""The tool that writes random checkpoints, and the docstrings' examples."""

import doctest
import sys

import pytest
from tokenizers import Tokenizer

from qwen3vl_disagg.checkpoint import layouts, load_model, read_config
from qwen3vl_disagg.model.config import check_config
from qwen3vl_disagg.processing import Processor
from tools import make_checkpoint
from tools.checkpoints import RANDOM_PRESETS
from tools.training.make_tokenizer import ADDED_TOKENS, SPECIAL_TOKENS, build_syllable_tokenizer


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


def test_a_checkpoint_that_thinks(tmp_path, monkeypatch):
    run(monkeypatch, "--out", tmp_path, "--thinking")
    prompt = Processor.from_folder(tmp_path, read_config(tmp_path)).prepare([{"role": "user", "content": "?"}])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(prompt.token_ids).endswith("assistant\n<think>\n")


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
    assert args[-1] != "30b-a3b" or "on the device" in caught.value.code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RANDOM_PRESETS)
def test_presets_are_sound(name):
    assert check_config(RANDOM_PRESETS[name]) == []


def test_the_vocabulary_of_mid_is_full(tmp_path):
    config = RANDOM_PRESETS["mid"]
    make_checkpoint.write_small_tokenizer(tmp_path, config)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config.text.vocab_size
    for name, token_id in (
        ("<|image_pad|>", config.image_token_id),
        ("<|video_pad|>", config.video_token_id),
        ("<|vision_start|>", config.vision_start_token_id),
        ("<|vision_end|>", config.vision_end_token_id),
    ):
        assert tokenizer.token_to_id(name) == token_id


def test_syllables_make_one_token_of_a_word(tmp_path):
    build_syllable_tokenizer(256 + 105 + 105 * 105 + 1, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first_special = 256 + 105 + 105 * 105 + 1
    assert [tokenizer.token_to_id(name) for name in (*SPECIAL_TOKENS, *ADDED_TOKENS)] == list(
        range(first_special, first_special + len(SPECIAL_TOKENS) + len(ADDED_TOKENS))
    )
    assert tokenizer.encode("ba").tokens == ["ba"]
    assert tokenizer.encode("zuba").tokens == ["zuba"]
    assert tokenizer.encode("bababa").tokens == ["bababa"]  # the only one of three
    text = "Any text, whatever: \u00e9\U0001f600\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_there_are_only_so_many_words(tmp_path):
    with pytest.raises(ValueError, match=r"1168755 words .* 1169012"):
        build_syllable_tokenizer(256 + 1168756, tmp_path)


def test_docstring_examples():
    results = doctest.testmod(layouts)
    assert results.attempted > 0
    assert results.failed == 0
