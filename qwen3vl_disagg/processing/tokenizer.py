"""Text <-> token ids. Text never becomes a special token: those are placed by id, where the prompt's structure says.

Special is what tokenizer.json flags so. Its other added tokens (`<think>`, `<tool_call>`, ..) are words of the text:
models write them, decoding keeps them, and typed ones are atomic, as in the reference.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders

from qwen3vl_disagg.core.errors import CheckpointError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
STRUCTURAL = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)


_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUT = re.compile("(?<=[A-Za-z])(?= [A-Za-z])")
"""Where no word of that pattern goes on: it ends with its letters, and the next one begins with the blank."""
SLICE_CHARS = 2**16


class TooManyTokens(ValueError):
    """A text has more tokens than it may; `count` of them were found."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens")
        self.count = count


def _byte_chars() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: itself where it is one, else from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_chars()


class TextStream:
    """Turns tokens into text as they come. The pieces joined equal `Tokenizer.decode` of all of them.

    A piece ends at a whole character: bytes of an unfinished one wait for the next token, or for `finish`. Each token
    costs its own length, whatever came before. (The library's stream decodes again from the last whole character.)
    """

    def __init__(self, tokenizer: Tokenizer, *, with_specials: bool = False) -> None:
        self._tokenizer = tokenizer
        self._left_out = frozenset[int]() if with_specials else frozenset(tokenizer.special_ids.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._left_out:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: an unfinished character shows as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """Byte-level BPE from a checkpoint's tokenizer.json."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        # Special tokens found in a text are split like any other characters.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = {token.content: i for i, token in added.items() if token.special}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json. CheckpointError if it is absent, broken, or lacks a token that prompts are built of."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(folder, ["tokenizer.json is missing"])
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises its own untyped exceptions
            raise CheckpointError(folder, [f"tokenizer.json cannot be read: {error}"]) from error
        tokenizer = cls(backend)
        problems = [f"{name} is not a special token" for name in STRUCTURAL if name not in tokenizer.special_ids]
        # A name of one character could not be broken apart where a user types it (see ChatTemplate).
        problems += [f"special token {name!r} is too short" for name in tokenizer.special_ids if len(name) < 2]
        if not isinstance(backend.decoder, decoders.ByteLevel):
            problems.append("the decoder is not ByteLevel")
        if problems:
            raise CheckpointError(folder, [f"tokenizer.json: {problem}" for problem in problems])
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids in use are below this."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, special: str) -> int:
        """The id of a special token. KeyError if there is none of that name."""
        return self.special_ids[special]

    def encode(self, text: str, *, at_most: int | None = None) -> list[int]:
        """Ids of plain text; nothing in it becomes a special token.

        TooManyTokens if there are more than `at_most`. Where the tokenizer's words can be told apart the text is taken
        slice by slice, so that a long one does not have to be tokenized whole to find that out.
        """
        token_ids: list[int] = []
        for part in self._slices(text):
            token_ids += self.backend.encode(part, add_special_tokens=False).ids
            if at_most is not None and len(token_ids) > at_most:
                raise TooManyTokens(len(token_ids))
        return token_ids

    def _slices(self, text: str) -> Iterator[str]:
        start = 0
        while len(text) - start > SLICE_CHARS and self._has_qwen_words:
            cut = _CUT.search(text, start + SLICE_CHARS)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    @cached_property
    def _has_qwen_words(self) -> bool:
        """Whether a text may be cut at `_CUT`: the published pattern, and no added token that reaches over a blank."""
        raw = json.loads(self.backend.to_str())
        steps = (raw.get("pre_tokenizer") or {}).get("pretokenizers") or []
        patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
        others = {step.get("type") for step in steps} - {"Split"}
        reach = any(
            " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in raw.get("added_tokens") or []
        )
        is_nfc = (raw.get("normalizer") or {"type": "NFC"}).get("type") == "NFC"
        return patterns == [_QWEN_WORDS] and others == {"ByteLevel"} and is_nfc and not reach

    @cached_property
    def _shares(self) -> np.ndarray:
        """`[256]`: 1 / the length of the longest token with this byte in it; 0 for bytes of which no token is made.

        In a token of n bytes each byte's share is at most 1 / n, so the shares of a text's bytes add up to no more than
        its number of tokens.
        """
        lengths = np.zeros(256)
        for token in sorted(self.backend.get_vocab(with_added_tokens=False), key=len):
            lengths[[_BYTE_OF_CHAR[char] for char in set(token) if char in _BYTE_OF_CHAR]] = len(token)
        for content in self._added.values():
            data = content.encode()
            for byte in data:
                lengths[byte] = max(lengths[byte], len(data))
        return np.divide(1.0, lengths, out=np.zeros(256), where=lengths > 0)

    @cached_property
    def max_token_bytes(self) -> int:
        """Of the longest token."""
        return round(1 / float(self._shares[self._shares > 0].min()))

    def num_tokens_at_least(self, text: str) -> int:
        """A lower bound of `len(encode(text))`, in a time and memory that are small beside those of `encode`."""
        if not text.isascii() and self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        data = np.frombuffer(text.encode(), np.uint8)
        return int(np.bincount(data, minlength=256) @ self._shares * (1 - 1e-9))

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""
        return self.backend.decode(token_ids, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; of a special token its name. Empty for an id that is not in use."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.backend.id_to_token(token_id) or ""
        return bytes(_BYTE_OF_CHAR[char] for char in token)

    def stream(self, *, with_specials: bool = False) -> TextStream:
        """`with_specials`: these are text too, by their names."""
        return TextStream(self, with_specials=with_specials)
