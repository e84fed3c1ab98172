"""A byte-level BPE tokenizer in the form of Qwen's: trained on given texts, or of made-up syllables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice, product
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Atomic, but part of the text: not skipped when decoding."""


def build_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train and write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    `vocab_size` counts the 256 bytes and the merges; the added tokens follow it, so that their ids are stable only for
    a corpus with enough merges. ValueError if the corpus has too few.
    """
    tokenizer = _with_pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(f"vocabulary of {tokenizer.get_vocab_size()} is larger than {vocab_size}")
    _write(tokenizer, folder)


def build_syllable_tokenizer(vocab_size: int, folder: Path) -> None:
    """Write the same files without any text to learn from: a byte is a token, and so is a word of up to 3 syllables.

    For random weights with a vocabulary too large for a small corpus. ValueError if there are not so many words.
    """
    merges = list(islice(_syllable_merges(), max(0, vocab_size - 256)))
    if len(merges) != vocab_size - 256:
        raise ValueError(f"256 bytes and {len(merges)} words do not make a vocabulary of {vocab_size}")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    _write(_with_pipeline(models.BPE(vocab=vocab, merges=merges)), folder)


def _syllable_merges() -> Iterator[tuple[str, str]]:
    """105 syllables, then every two of them, then every three."""
    syllables = [first + second for first in "bcdfghjklmnpqrstvwxyz" for second in "aeiou"]
    yield from ((syllable[0], syllable[1]) for syllable in syllables)
    yield from product(syllables, syllables)
    yield from ((first + second, third) for first, second, third in product(syllables, repeat=3))


def _with_pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
        + [AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2TokenizerFast",
        "model_max_length": 4096,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_template(folder)


def write_template(folder: Path, *, thinking: bool = False) -> None:
    """Write chat_template.jinja: that of an Instruct checkpoint, or of one that thinks before it answers."""
    name = "chat_template_thinking.jinja" if thinking else "chat_template.jinja"
    shutil.copyfile(Path(__file__).parent / name, folder / "chat_template.jinja")
