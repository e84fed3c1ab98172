"""A small tokenizer folder for tests, in the form of Qwen's."""

from pathlib import Path

from tools.training.make_tokenizer import build_tokenizer

_TEXTS = [
    "What colour is the red circle on the left? It's a square, they're 12 of them.\n\nfoo  bar\tbaz",
    "<|im_end|>",
]


def write_tokenizer(folder: Path) -> Path:
    build_tokenizer(_TEXTS * 3, 330, folder)
    return folder
