"""Text <-> token ids. Text never becomes a special token: those are placed by id, where the prompt's structure says.

Special is what tokenizer.json flags so. Its other added tokens (`<think>`, `<tool_call>`, ..) are words of the text:
models write them, decoding keeps them, and typed ones are atomic, as in the reference.
"""

from __future__ import annotations

import codecs
from pathlib import Path

import tokenizers
from tokenizers import decoders

from qwen3vl_disagg.core.errors import CheckpointError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
STRUCTURAL = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)


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

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._specials = frozenset(tokenizer.special_ids.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._specials:
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

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it becomes a special token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""
        return self.backend.decode(token_ids, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; of a special token its name. Empty for an id that is not in use."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.backend.id_to_token(token_id) or ""
        return bytes(_BYTE_OF_CHAR[char] for char in token)

    def stream(self) -> TextStream:
        return TextStream(self)
