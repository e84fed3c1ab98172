"""Run llama.cpp's converter on a checkpoint, for the bench: `llama_convert SOURCE CHECKPOINT FOLDER TYPE`.

The converter knows a tokenizer by a hash of what it makes of a text. Tokenizers of this repository's own checkpoints
split as Qwen2's does, but have other tokens; of these, and of no others, the name of the way to split is given here.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tools.training.make_tokenizer import SPLIT

MODEL, PROJECTOR = "model.gguf", "mmproj.gguf"


def splits_as_qwen2(checkpoint: Path) -> bool:
    """Whether the tokenizer of a folder cuts text by Qwen2's pattern before it looks for tokens."""
    cutter = json.loads((checkpoint / "tokenizer.json").read_text())["pre_tokenizer"]
    steps = cutter.get("pretokenizers", [cutter])
    return [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"] == [SPLIT]


def main(source: str, checkpoint: str, folder: str, dtype: str) -> None:
    """Write the language model and the vision tower of `checkpoint` into `folder`."""
    sys.path.insert(0, source)
    converter: Any = importlib.import_module("convert_hf_to_gguf")
    text_model = importlib.import_module("conversion.base").TextModel
    by_hash = text_model.get_vocab_base_pre

    def name(model: Any, tokenizer: Any) -> str:
        try:
            return by_hash(model, tokenizer)
        except NotImplementedError:
            if not splits_as_qwen2(Path(checkpoint)):
                raise
            return "qwen2"

    text_model.get_vocab_base_pre = name
    for file, options in ((MODEL, []), (PROJECTOR, ["--mmproj"])):
        sys.argv = ["convert_hf_to_gguf", checkpoint, "--outtype", dtype, "--outfile", f"{folder}/{file}", *options]
        converter.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
