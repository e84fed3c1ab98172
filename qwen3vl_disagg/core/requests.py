"""Request types shared by the rooms above: plain, immutable, msgspec-encodable values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Literal

import msgspec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.sampling_bounds import LIMITS, NOT_GIVEN, check_logit_bias, check_number, check_stop

FinishReason = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are picked. `temperature == 0` is greedy; the defaults of all else switch it off.

    `engine/sampler.py` says in which order these work, core/sampling_bounds.py what they may be: InputError naming the
    field, at whatever way they are made. One stop string may stand for a list of one.
    """

    max_new_tokens: int = 128
    is_open_ended: bool = False
    """Nobody asked for so many: `max_new_tokens` is a bound, and shrinks to what there is room for."""
    min_tokens: int = 0
    """No end token before that many tokens, and no stop string that is complete before them."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one's probability are out."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token of the output; `frequency_penalty`: as often as it is there."""
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Positive logits of tokens of prompt and output are divided by it, others multiplied."""
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    """Token id -> what is added to its logit, from -100 to 100."""
    stop: list[str] = msgspec.field(default_factory=list)
    """The text ends before the first of these. Whoever makes the text looks for them: the engine has no tokenizer."""
    seed: int | None = None
    ignore_eos: bool = False
    """Ban the end tokens, so that exactly `max_new_tokens` come."""
    cache_salt: str = ""
    """Whose request it is, as a digest: prefixes are shared among equal ones only."""
    logprobs: int | None = None
    """None: none. K >= 0: each token's logprob and the K most likely ones, from the raw distribution."""

    def __post_init__(self) -> None:
        for name in LIMITS:
            value = getattr(self, name)
            if value is not None or name not in NOT_GIVEN:
                check_number(name, value)
        if self.min_tokens > self.max_new_tokens:
            problem = f"min_tokens is {self.min_tokens}, but only {self.max_new_tokens} may come"
            raise InputError(problem, param="min_tokens")
        for name, kind in (("ignore_eos", bool), ("is_open_ended", bool), ("cache_salt", str)):
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"{name} must be a {kind.__name__}, not {getattr(self, name)!r}", param=name)
        msgspec.structs.force_setattr(self, "stop", check_stop(self.stop))
        msgspec.structs.force_setattr(self, "logit_bias", check_logit_bias(self.logit_bias))


class VisualItem(msgspec.Struct, frozen=True, kw_only=True):
    """One image or video of a prompt, known from its header alone.

    `grid` is (t, h, w) in patches, `num_rows = t * h * w / merge**2` the rows it fills in the prompt, `offset` the
    index of its first placeholder token, `digest` the SHA-256 (hex) of its bytes, `param` where it stood in the
    caller's messages.

    A video's rows stand in t runs of equal length with text (timestamps) between them: with two frames of 4 rows,
    run_offsets (5, 14) and so stop 18, row 3 has token 8, row 4 token 14, and 4 rows stand before token 12.
    """

    modality: Literal["image", "video"]
    digest: str
    num_bytes: int
    grid: tuple[int, int, int]
    num_rows: int
    offset: int
    param: str
    run_offsets: tuple[int, ...] = ()
    """Of a video: the index of each run's first placeholder; the first is `offset`."""
    frames: tuple[int, ...] = ()
    """Of a video: which of its frames are looked at, from 0, in their order."""
    is_frame_list: bool = False
    """The bytes are a list of images, not a file."""
    size: tuple[int, int] | None = None
    """(height, width) of the image, or of each frame, as the header says, from which `grid` follows."""
    salt: str = ""
    """Whose it is: what one has sent is in no cache for another."""

    @property
    def content(self) -> tuple[str, str, tuple[int, int, int], tuple[int, ...], bool, str]:
        """All of what the item's rows depend on that is the request's own, and whose they are."""
        frames, height, width = self.grid
        return self.modality, self.digest, (frames, height, width), tuple(self.frames), self.is_frame_list, self.salt

    @property
    def runs(self) -> tuple[int, ...]:
        """The index of each run's first placeholder; an image has one run."""
        return self.run_offsets or (self.offset,)

    @property
    def run_rows(self) -> int:
        return self.num_rows // len(self.runs)

    @property
    def stop(self) -> int:
        """The index after the last placeholder."""
        return self.runs[-1] + self.run_rows

    def token_of(self, row: int) -> int:
        """The index of a row's placeholder; `stop` for the row after the last."""
        run, rest = divmod(row, self.run_rows)
        return self.stop if row == self.num_rows else self.runs[run] + rest

    def rows_before(self, index: int) -> int:
        """Rows whose placeholders stand before a token of the prompt, or after all of it."""
        run = max(0, bisect_right(self.runs, index) - 1)
        return run * self.run_rows + min(max(0, index - self.runs[run]), self.run_rows)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rows [start, stop) by run: (first row, row after the last, the first one's token)."""
        while start < stop:
            end = min(stop, (start // self.run_rows + 1) * self.run_rows)
            yield start, end, self.token_of(start)
            start = end


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log probability (natural, raw distribution) of a sampled token and of the most likely ones."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class ItemTimings(msgspec.Struct, kw_only=True):
    """Wall milliseconds of one item's stages."""

    preprocess: float = 0.0
    encode: float = 0.0
    """That of the whole batch."""
    transfer: float = 0.0
    transfer_bytes: int = 0
    encode_rank: int = -1
    rows: int = 0
    resumes: int = 0
    attempts: int = 1
    cached: bool = False
    """The encode rank had the rows already: `preprocess` and `encode` are 0."""
    batch: int = 0
    """Which run of the encode rank's tower the item was in, from 1. Items of one run share its time."""
    note: str = ""
    """What of its file is missing or was skipped, if anything: the answer is about the rest."""


class RequestTimings(msgspec.Struct, kw_only=True):
    """Wall milliseconds per stage of one request, plus what travelled and where. The names are the HTTP surface's."""

    queue: float = 0.0
    preprocess: float = 0.0
    encode: float = 0.0
    transfer: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    transfer_bytes: int = 0
    encode_ranks: list[int] = msgspec.field(default_factory=list)
    language_rank: int = 0
    resumes: int = 0
    cached_tokens: int = 0
    items: list[ItemTimings] = msgspec.field(default_factory=list)
