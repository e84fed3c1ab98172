"""`plan`: for every encode : language split of a number of ranks, memory, times and limits, from arithmetic alone.

docs/sizing.md says what the figures mean and what is left out; the terms behind the times are those of `times.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qwen3vl_disagg.core.devices import DTYPES
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import DEFAULT_ENGINE, EngineSettings, default_chunk_tokens
from qwen3vl_disagg.encode.pipeline import DECODE_THREADS
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.kv_room import KvRoom
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.plan.hardware import Cost, Hardware, Memory
from qwen3vl_disagg.plan.times import (
    Dispatch,
    Place,
    Term,
    chunks,
    decode_terms,
    first_token_terms,
    prefill_terms,
    total_seconds,
)

MAX_RANKS = 4096
_LEAST = {"images": 0, "visual_tokens": 1, "text_tokens": 1, "output_tokens": 1, "concurrency": 1}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What arrives: requests that are all alike."""

    images: int = 1
    visual_tokens: int = 1024
    """Of each image: 32 x 32 pixels each, after resizing."""
    text_tokens: int = 64
    """Of a prompt, everything but visual tokens: the template and two marks for each image included."""
    output_tokens: int = 256
    concurrency: int = 32
    """Requests that run at once, unless `requests_s` says how many arrive."""
    requests_s: float | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(self, name)}: must be at least {least}", param=option)
        if self.requests_s is not None and not (0 < self.requests_s < math.inf):
            raise InputError(f"--requests-s {self.requests_s}: must be above 0", param="requests-s")

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.images * self.visual_tokens

    @property
    def context(self) -> float:
        """Tokens of a request half-way through its output."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split and what it gives; bytes and seconds. `math.inf` is a limit that is none."""

    encode: int
    language: int
    encode_memory: dict[str, float]
    """Bytes on an encode rank, by what they are for; `language_memory`: on the language rank with the most experts."""
    language_memory: dict[str, float]
    room: KvRoom
    """For keys and values, on the same rank."""
    missing_bytes: float
    """0: it fits. Else what a rank lacks (where ranks share a machine's memory, what all of them lack)."""
    running: int
    first_token_s: float
    loaded_first_token_s: float
    token_s: float
    loaded_token_s: float
    gap_s: float
    tokens_s: float
    encode_requests_s: float
    language_requests_s: float
    requests_s: float
    is_overloaded: bool
    """The rate asked for is more than it takes."""
    first_token: dict[str, list[Term]] = field(repr=False)
    """The terms of `first_token_s` by stage; `token`: of `token_s`."""
    token: list[Term] = field(repr=False)
    costs: dict[Cost, float] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.encode}+{self.language}"

    @property
    def limited_by(self) -> str:
        return "encode" if self.encode_requests_s < self.language_requests_s else "language"


def plan(
    config: ModelConfig,
    hardware: Hardware,
    workload: Workload,
    num_ranks: int,
    *,
    dtype: str | None = None,
    is_int8: bool = False,
    dispatch: Dispatch = "gather",
    settings: EngineSettings = DEFAULT_ENGINE,
) -> list[Split]:
    """Every split of `num_ranks` ranks, by encode ranks. `dtype`: default the config's. InputError for what cannot be.

    Ranks have a unit (GPU, core) each, or share `hardware.num_units`.
    """
    dtype = dtype or config.dtype
    if not 2 <= num_ranks <= MAX_RANKS:
        raise InputError(f"{num_ranks} ranks: must be 2 to {MAX_RANKS}, so that both roles have one", param="gpus")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype}: must be one of {', '.join(DTYPES)}", param="dtype")
    longest = config.text.max_position_embeddings
    if workload.prompt_tokens + workload.output_tokens > longest:
        raise InputError(
            f"{workload.prompt_tokens} prompt tokens and {workload.output_tokens} new ones are more than the context "
            f"of {longest}",
            param="text-tokens",
        )
    model = SizedModel(config, DTYPES[dtype].itemsize, is_int8, hardware.is_cuda)
    return [
        plan_split(Place(model, hardware, encode, num_ranks - encode, dispatch, settings), workload, dtype)
        for encode in range(1, num_ranks)
    ]


def chunk_tokens(hardware: Hardware, settings: EngineSettings) -> int:
    """Of prompts in a step while others are being answered."""
    return min(default_chunk_tokens(is_cuda=hardware.is_cuda), settings.max_prefill_tokens)


class _Times:
    """Seconds of one split, for any number of running requests. `loaded`: while the others run."""

    def __init__(self, place: Place, workload: Workload, dtype: str) -> None:
        self.place, self.workload = place, workload
        self.costs = place.hardware.costs(dtype, place.num_hosts)
        self.chunk = chunk_tokens(place.hardware, place.settings)
        prompt, most = workload.prompt_tokens, place.num_language
        together = prefill_terms(place, prompt, num_prompts=most, most=self.chunk)
        self.prefill_s = total_seconds(together, self.costs) / most
        """Of a request, all language ranks prefilling."""
        self.first_token = first_token_terms(place, workload.images, workload.visual_tokens, workload.text_tokens)
        self.stages_s = {name: total_seconds(terms, self.costs) for name, terms in self.first_token.items()}

    def token(self, running: int) -> list[Term]:
        return decode_terms(self.place, running, self.workload.context)

    def token_s(self, running: int) -> float:
        return total_seconds(self.token(running), self.costs)

    def loaded_first_token_s(self, running: int) -> float:
        """Prefill in chunks, each followed by a decode step of the others."""
        if running == 1:
            return sum(self.stages_s.values())
        prompt = self.workload.prompt_tokens
        alone = total_seconds(prefill_terms(self.place, prompt, most=self.chunk), self.costs)
        others = len(chunks(prompt, self.chunk)) * self.token_s(running - 1)
        return sum(self.stages_s.values()) - self.stages_s["prefill"] + alone + others

    def gap_s(self, running: int) -> float:
        if running == 1:
            return self.token_s(1)
        piece = min(self.chunk, self.workload.prompt_tokens)
        return self.token_s(running) + total_seconds(prefill_terms(self.place, piece, most=piece), self.costs)

    def loaded_token_s(self, running: int, requests_s: float) -> float:
        """Infinite when prefill alone takes all of the time."""
        left = 1.0 - requests_s * self.prefill_s
        return self.token_s(running) / left if left > 0 else math.inf

    def image_s(self) -> float:
        """Seconds of one encode rank for a request's images. On a GPU they are decoded beside the tower."""
        units, workload = self.place.units, self.workload
        rows = workload.visual_tokens * self.costs["preprocess_row"]
        flop = self.place.model.tower_flop(workload.visual_tokens)
        tower = self.costs["tower"] + units.compute([flop]) * self.costs["tower_flop"]
        return workload.images * (rows + tower if self.place.hardware.num_units else max(rows / DECODE_THREADS, tower))

    def limits(self, running: int) -> tuple[float, float, float]:
        """Requests/s of the encode side, the language side, and both: the smaller one, or where they share units what
        these do for both together."""
        units, image_s = self.place.units, self.image_s()
        encode = min(self.place.num_encode, units.num_units) / image_s if image_s else math.inf
        language = 1 / (self.prefill_s + self.workload.output_tokens * self.token_s(running) / running)
        if not units.are_shared:
            return encode, language, min(encode, language)
        return encode, language, 1 / (image_s / units.num_units + 1 / language)

    def running(self, requests_s: float, most: int) -> int:
        """Little's law from below; more than `most` when the rate is more than can be taken."""
        running = 1
        while running <= most:
            token_s = self.loaded_token_s(running, requests_s)
            stay = self.loaded_first_token_s(running) + self.workload.output_tokens * token_s
            needed = math.ceil(requests_s * stay) if stay < math.inf else most + 1
            if needed <= running:
                return running
            running = needed
        return running


def plan_split(place: Place, workload: Workload, dtype: str) -> Split:
    """One split. No more requests run than the engine takes at once on a language rank, by number and by room for
    their keys and values; with a rate, the limits are those of that most."""
    times, settings, model = _Times(place, workload, dtype), place.settings, place.model
    ranks = range(place.num_encode + place.num_language)
    encode, language = ranks[: place.num_encode], ranks[place.num_encode :]
    room = Memory.of(place.hardware, len(ranks)).room(language.start, model, settings, encode, language)
    each = workload.prompt_tokens + workload.output_tokens
    most = max(1, min(settings.max_running, room.requests_of(each))) * place.num_language
    rate = workload.requests_s
    wanted = workload.concurrency if rate is None else times.running(rate, most)
    running = min(wanted, most)
    encode_limit, language_limit, limit = times.limits(running if rate is None else most)
    encode_memory = model.encode_memory(workload.visual_tokens if workload.images else 1)
    language_memory = model.language_memory(
        place.num_language,
        -(-running // place.num_language),
        each,
        min(workload.prompt_tokens, settings.max_prefill_tokens),
        room.page_size,
    )
    for role in (encode_memory, language_memory):
        role["process"] = place.hardware.reserved_bytes
    token = times.token(running)
    token_s = total_seconds(token, times.costs)
    return Split(
        encode=place.num_encode,
        language=place.num_language,
        encode_memory=encode_memory,
        language_memory=language_memory,
        room=room,
        missing_bytes=_missing(place, sum(encode_memory.values()), sum(language_memory.values()))
        or max(0, -(-each // room.page_size) - room.num_pages) * room.page_size * room.token_bytes,
        running=running,
        first_token_s=sum(times.stages_s.values()),
        loaded_first_token_s=times.loaded_first_token_s(running),
        token_s=token_s,
        loaded_token_s=times.loaded_token_s(running, limit if rate is None else min(rate, limit)),
        gap_s=times.gap_s(running),
        tokens_s=running / token_s,
        encode_requests_s=encode_limit,
        language_requests_s=language_limit,
        requests_s=limit,
        is_overloaded=rate is not None and (wanted > most or rate > limit),
        first_token=times.first_token,
        token=token,
        costs=times.costs,
    )


def _missing(place: Place, encode: float, language: float) -> float:
    """Bytes that are not there: on a rank, or of all ranks where they share a machine."""
    memory = place.hardware.memory_bytes
    if place.hardware.num_units is None:
        return max(0.0, encode - memory, language - memory)
    return max(0.0, place.num_encode * encode + place.num_language * language - place.units.num_units * memory)


def best(splits: list[Split], workload: Workload) -> Split:
    """Of those that fit (of all, when none does) the one that takes the most requests/s, then the earliest token.

    With a rate, of those that take it the one that answers a request soonest.
    """
    fitting = [split for split in splits if not split.missing_bytes] or splits
    able = [split for split in fitting if not split.is_overloaded]
    if workload.requests_s is not None and able:
        return min(able, key=lambda one: one.loaded_first_token_s + workload.output_tokens * one.loaded_token_s)
    return max(fitting, key=lambda one: (round(one.requests_s, 9), -one.first_token_s, -one.encode))
