"""`plan`: for every encode : language split of a number of ranks, memory, times and limits, from arithmetic alone.

    split = encode ranks + language ranks
    first token        request + images (spread over encode ranks) + transfer + prefill, the system to oneself
      loaded           prefill in chunks of `chunk` tokens with a step of the others' decode after each
    token              one decode step of all running requests
      loaded           token / (1 - requests/s x prefill seconds of a request)
    longest gap        a decode step and one chunk of somebody's prefill
    tokens/s           running requests / token
    requests/s
      encode           encode ranks / seconds of a request's images on one: on a GPU those of the tower or, if that is
                       more, of decoding on two threads beside it; on cores both
      language         1 / (prefill seconds of a request, all ranks prefilling + output tokens x token / running)
      both             the smaller of the two; where ranks share units 1 / (1 / encode + 1 / language), with all units
    running            as given; with a rate, the least n with n >= rate x (first token + output tokens x token), both
                       loaded (Little's law); never more than the engine takes at once on a language rank, by number
                       and by the room for their keys and values (`kv_room`). With a rate, the limits are those of
                       that most.

Left out: waiting for a free encode or language rank (a rate near a limit makes it long), caches of images and prefixes,
prefill beside later images, decoding several images at once, uneven routing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import DEFAULT_ENGINE, EngineSettings, default_chunk_tokens
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.kv_room import KvRoom
from qwen3vl_disagg.parallel.sizes import SizedModel, chunks
from qwen3vl_disagg.plan.hardware import Cost, Hardware
from qwen3vl_disagg.plan.kv_where import Memory, room_of
from qwen3vl_disagg.plan.times import (
    Dispatch,
    Place,
    Term,
    decode_terms,
    first_token_terms,
    prefill_terms,
    total_seconds,
)

ITEMSIZE = {"float32": 4, "bfloat16": 2}
DECODE_THREADS = 2
"""Of an encode rank, for the images that come next."""
MAX_RANKS = 4096


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
        for name, least in (
            ("images", 0),
            ("visual_tokens", 1),
            ("text_tokens", 1),
            ("output_tokens", 1),
            ("concurrency", 1),
        ):
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
    if dtype not in ITEMSIZE:
        raise InputError(f"dtype {dtype}: must be one of {', '.join(ITEMSIZE)}", param="dtype")
    longest = config.text.max_position_embeddings
    if workload.prompt_tokens + workload.output_tokens > longest:
        raise InputError(
            f"{workload.prompt_tokens} prompt tokens and {workload.output_tokens} new ones are more than the context "
            f"of {longest}",
            param="text-tokens",
        )
    model = SizedModel(config, ITEMSIZE[dtype], is_int8, hardware.is_cuda)
    return [
        plan_split(Place(model, hardware, encode, num_ranks - encode, dispatch, settings), workload, dtype)
        for encode in range(1, num_ranks)
    ]


class _Times:
    """Seconds of one split, for any number of running requests."""

    def __init__(self, place: Place, workload: Workload, dtype: str) -> None:
        self.place, self.workload = place, workload
        self.costs = place.hardware.costs(dtype, place.num_hosts)
        self.chunk = min(default_chunk_tokens(is_cuda=place.hardware.is_cuda), place.settings.max_prefill_tokens)
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
        """Seconds of one encode rank for a request's images."""
        units, workload = self.place.units, self.workload
        rows = workload.visual_tokens * self.costs["preprocess_row"]
        flop = self.place.model.tower_flop(workload.visual_tokens)
        tower = self.costs["tower"] + units.compute([flop]) * self.costs["tower_flop"]
        return workload.images * (rows + tower if self.place.hardware.num_units else max(rows / DECODE_THREADS, tower))

    def limits(self, running: int) -> tuple[float, float, float]:
        """Requests/s of the encode side, the language side, and both."""
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
    """One split. Its formulas are at the top of this file."""
    times, settings, room = _Times(place, workload, dtype), place.settings, _room(place)
    each = workload.prompt_tokens + workload.output_tokens
    most = max(1, min(settings.max_running, room.requests_of(each))) * place.num_language
    rate = workload.requests_s
    wanted = workload.concurrency if rate is None else times.running(rate, most)
    running = min(wanted, most)
    encode_limit, language_limit, limit = times.limits(running if rate is None else most)
    arriving = limit if rate is None else min(rate, limit)
    memory = (
        place.model.encode_memory(workload.visual_tokens) if workload.images else place.model.encode_memory(1),
        place.model.language_memory(
            place.num_language,
            -(-running // place.num_language),
            each,
            min(workload.prompt_tokens, settings.max_prefill_tokens),
            settings.page_size,
        ),
    )
    for role in memory:
        role["process"] = place.hardware.reserved_bytes
    token = times.token(running)
    return Split(
        encode=place.num_encode,
        language=place.num_language,
        encode_memory=memory[0],
        language_memory=memory[1],
        room=room,
        missing_bytes=_missing(place, sum(memory[0].values()), sum(memory[1].values()))
        or max(0, -(-each // settings.page_size) - room.num_pages) * settings.page_size * room.token_bytes,
        running=running,
        first_token_s=sum(times.stages_s.values()),
        loaded_first_token_s=times.loaded_first_token_s(running),
        token_s=total_seconds(token, times.costs),
        loaded_token_s=times.loaded_token_s(running, arriving),
        gap_s=times.gap_s(running),
        tokens_s=running / total_seconds(token, times.costs),
        encode_requests_s=encode_limit,
        language_requests_s=language_limit,
        requests_s=limit,
        is_overloaded=rate is not None and (wanted > most or rate > limit),
        first_token=times.first_token,
        token=token,
        costs=times.costs,
    )


def _room(place: Place) -> KvRoom:
    """What the engine would have on the language rank with the most experts."""
    ranks = range(place.num_encode + place.num_language)
    encode, language = ranks[: place.num_encode], ranks[place.num_encode :]
    memory = Memory.of(place.hardware, len(ranks))
    return room_of(language.start, place.model, place.settings, memory, encode, language)


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
