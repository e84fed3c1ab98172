"""Served splits of encode and language ranks, one after another: first tokens, decode, and what a fit makes of them.

The fit uses some of the splits and predicts the others; docs/sizing.md.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import torch
import tyro

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.plan.fit import (
    Compared,
    MeasuredDecode,
    MeasuredFirstToken,
    MeasuredSplit,
    Measurements,
    compare,
    fit,
)
from tools.bench_load import Stream, body, picture, send, text
from tools.bench_machine import busy_seconds, conclude, cpu_seconds, family, machine_facts, machine_line, table
from tools.bench_served import Served
from tools.bench_stats import decode_rate, gaps
from tools.checkpoints import config_to_dict

TIMEOUT_S = 600.0
REPEATS = 3
"""Requests of each kind in a round."""
TRIES = 5
"""Of a round that other programs disturb."""


@dataclass(frozen=True)
class Load:
    """What each split is asked. Every request has words or a picture of its own, so that no cache helps."""

    words: tuple[int, ...]
    sides: tuple[int, ...]
    decode_words: int
    new_tokens: int
    concurrency: tuple[int, ...]

    def concurrencies(self, language: int) -> list[int]:
        return sorted({1, language, 2 * language, *self.concurrency})


class Contents:
    """Numbers that were not used before."""

    def __init__(self, seed: int) -> None:
        self._next = 1_000_003 * seed

    def __call__(self) -> int:
        self._next += 1
        return self._next


@dataclass
class Seen:
    """One measurement over all rounds."""

    facts: dict[str, int]
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        """Of the values, beside the facts."""
        return {**self.facts, **{name: statistics.median(values) for name, values in self.values.items()}}


Key = TypeVar("Key")


def _take(kept: dict[Key, Seen], new: dict[Key, Seen]) -> None:
    for key, seen in new.items():
        mine = kept.setdefault(key, Seen(seen.facts))
        for name, values in seen.values.items():
            mine.values.setdefault(name, []).extend(values)


@dataclass
class Records:
    """Of one split, over all rounds."""

    encode: int
    language: int
    decode: dict[int, Seen] = field(default_factory=dict)
    first_token: dict[tuple[str, int], Seen] = field(default_factory=dict)
    other_cores: list[float] = field(default_factory=list)
    """That other programs used, in each round."""

    def take(self, turn: Records) -> None:
        """Add another turn's values."""
        _take(self.decode, turn.decode)
        _take(self.first_token, turn.first_token)
        self.other_cores += turn.other_cores

    def measured(self) -> MeasuredSplit:
        """Medians over rounds."""
        decode = [msgspec.convert(seen.medians(), MeasuredDecode) for seen in self.decode.values()]
        first = [msgspec.convert(seen.medians(), MeasuredFirstToken) for seen in self.first_token.values()]
        return MeasuredSplit(
            encode=self.encode,
            language=self.language,
            decode=decode,
            first_token=first,
            other_cores=max(self.other_cores),
        )


def parse_split(given: str) -> tuple[int, int]:
    """`1+3` -> encode and language ranks. SystemExit for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,3})\+([1-9]\d{0,3})", given)
    if match is None:
        raise SystemExit(f"--splits {given}: must be like 1+3, encode ranks + language ranks, at least one of each")
    return int(match[1]), int(match[2])


def ask(server: Served, request: bytes) -> Stream:
    """One streamed request, alone."""
    record = Stream(time.perf_counter())
    asyncio.run(asyncio.wait_for(send(server.port, request, record), TIMEOUT_S))
    return record


async def ask_all(port: int, requests: Sequence[bytes]) -> list[Stream]:
    """Several at once."""
    records = [Stream(time.perf_counter()) for _ in requests]
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        for request, record in zip(requests, records, strict=True):
            group.create_task(send(port, request, record))
    return records


def sampled(request: bytes, seed: int) -> bytes:
    """Tokens drawn, not the likeliest: greedy requests soon repeat themselves, and then all want the same experts."""
    return json.dumps({**json.loads(request), "temperature": 1.0, "seed": seed}).encode()


def num_tokens(server: Served, words: int, images: list[str], contents: Contents) -> dict[str, int]:
    """What a prompt of that many words, and these images, amounts to; the server warms up on it."""
    answer = server.post(body(text(words, contents()), images, 2, stream=False))
    rows = [item["rows"] for item in answer["timings"]["items"]]
    return {
        "images": len(rows),
        "visual_tokens": rows[0] if rows else 0,
        "text_tokens": answer["usage"]["prompt_tokens"] - sum(rows),
    }


def first_tokens(server: Served, load: Load, records: Records, contents: Contents) -> None:
    """One request at a time: text of several lengths, then one image of several sizes."""
    kinds = [("words", words) for words in load.words] + [("side", side) for side in load.sides]
    for kind in kinds:
        words = kind[1] if kind[0] == "words" else load.words[0]

        def images(kind: tuple[str, int] = kind) -> list[str]:
            return [picture(kind[1], contents())] if kind[0] == "side" else []

        facts = num_tokens(server, words, images(), contents)
        seen = records.first_token.setdefault(kind, Seen(facts))
        for _ in range(REPEATS):
            record = ask(server, body(text(words, contents()), images(), 2))
            stages = {f"{name}_ms": record.timings[name] for name in ("preprocess", "encode", "transfer")}
            # Without an image, preprocessing is the frontend's work on the prompt, which is in every first token.
            seen.add(ms=record.first_token_s * 1e3, **(stages if facts["images"] else {}))


def decode_steps(server: Served, load: Load, records: Records, contents: Contents) -> None:
    """Text requests that are decoded together."""
    prompt = num_tokens(server, load.decode_words, [], contents)["text_tokens"]
    for count in load.concurrencies(records.language):
        requests = [
            sampled(body(text(load.decode_words, contents()), [], load.new_tokens), contents()) for _ in range(count)
        ]
        stamps = [record.stamps for record in asyncio.run(ask_all(server.port, requests))]
        rate = decode_rate(stamps)
        opens, closes = max(times[0] for times in stamps), min(times[-1] for times in stamps)
        within = [[time for time in times if opens <= time <= closes] for times in stamps]
        facts = {"concurrency": count, "prompt_tokens": prompt, "new_tokens": load.new_tokens}
        seen = records.decode.setdefault(count, Seen(facts))
        seen.add(token_ms=statistics.fmean(gaps(within)) * 1e3, tokens_s=rate)


def run_turn(records: Records, options: Sequence[str], load: Load, contents: Contents, most_others: float) -> None:
    """One round of a split; again when other programs used more than `most_others` cores, a few times."""
    for left in reversed(range(TRIES)):
        turn = Records(records.encode, records.language)
        others = run_split(turn, options, load, contents)
        print(f"{records.encode}+{records.language}: other programs used {others:.2f} cores", file=sys.stderr)
        if others <= most_others or not left:
            break
    records.take(turn)


def run_split(records: Records, options: Sequence[str], load: Load, contents: Contents) -> float:
    """Start the split, measure, end it. Cores that other programs used meanwhile."""
    with Served(records.encode + records.language, [*options, "--encode-ranks", str(records.encode)]) as server:
        own = family(server.process.pid) | {os.getpid()}
        started, others = time.perf_counter(), busy_seconds() - cpu_seconds(own)
        first_tokens(server, load, records, contents)
        decode_steps(server, load, records, contents)
        others = (busy_seconds() - cpu_seconds(own) - others) / (time.perf_counter() - started)
        records.other_cores.append(max(0.0, others))
        return records.other_cores[-1]


def report(result: dict[str, Any], measured: Measurements, compared: Sequence[Compared]) -> str:
    """Markdown for people."""
    machine = measured.machine
    title = (
        f"{machine_line(machine)}; {measured.model}, {measured.dtype}, medians of {result['rounds']} rounds; "
        f"other programs used up to {max(split.other_cores for split in measured.splits):.2f} cores in a split's round"
    )
    head = ["split", "requests at once", "ms per token", "tokens/s"]
    rows = [
        [split.name, str(one.concurrency), f"{one.token_ms:.1f}", f"{one.tokens_s:.1f}"]
        for split in measured.splits
        for one in split.decode
    ]
    first_head = ["split", "visual tokens", "text tokens", "first token ms", "preprocess", "encode", "transfer"]
    first_rows = [
        [split.name, str(one.images * one.visual_tokens), str(one.text_tokens)]
        + [f"{value:.1f}" for value in (one.ms, one.preprocess_ms, one.encode_ms, one.transfer_ms)]
        for split in measured.splits
        for one in split.first_token
    ]
    parts = [title, table(head, rows), table(first_head, first_rows)]
    if compared:
        parts += [f"Fitted on {' and '.join(result['fit_on'])}:", compared_table(compared)]
    return "\n\n".join(parts)


def compared_table(compared: Sequence[Compared]) -> str:
    rows = [
        [one.split, one.what, f"{one.predicted:.1f} {one.unit}", f"{one.measured:.1f} {one.unit}", f"{one.ratio:.2f}"]
        for one in compared
    ]
    return table(["split", "", "predicted", "measured", "ratio"], rows)


def splits(
    splits: tuple[str, ...] = ("1+1", "1+3", "2+4"),
    fit_on: tuple[str, ...] = (),
    rounds: int = 3,
    model: Path | None = None,
    quantize: Literal["none", "int8"] = "none",
    words: tuple[int, ...] = (8, 96),
    image_sides: tuple[int, ...] = (224, 448),
    decode_words: int = 16,
    new_tokens: int = 48,
    concurrency: tuple[int, ...] = (2, 4),
    most_others: float = math.inf,
    seed: int = 0,
    out: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """First token, time per token and tokens/s of served splits, and a fit that predicts those it has not seen.

    Args:
        splits: Encode + language ranks of each. In every round each is started once, in one order in odd rounds and
            back in even ones; only one is there at a time.
        fit_on: Those that the fit sees. Default: those with the fewest and the most language ranks.
        rounds: Rounds; the figures are medians.
        model: A checkpoint folder instead of the small one in the package.
        quantize: As of the server.
        words: Made-up words in the text requests whose first token is timed.
        image_sides: Height and width in pixels of the images whose first token is timed.
        decode_words: Words in the prompts that are decoded from.
        new_tokens: Tokens for each of those.
        concurrency: Requests decoded together, beside 1, as many as language ranks, and twice as many.
        most_others: Do a round of a split again, up to 4 times, when other programs used more cores than that.
        seed: Of all contents.
        out: File for the measurements, to be given to `qwen3vl-disagg plan --fit`.
        as_json: Print the JSON line only.
    """
    pairs = {given: parse_split(given) for given in splits}
    by_language = sorted(pairs, key=lambda name: pairs[name][1])
    fit_on = fit_on or (by_language[0], by_language[-1])
    if min(rounds, len(words), new_tokens // 4, decode_words, *words, *image_sides, *concurrency) < 1:
        raise SystemExit("need at least one round, words, 4 new tokens, and sizes of at least 1")
    if len(pairs) < 2 or not set(fit_on) <= set(pairs) or len(set(fit_on)) < 2:
        raise SystemExit(f"a fit needs two of the splits {', '.join(pairs)}, got {', '.join(fit_on) or 'none'}")
    folder = resolve_model_folder(None if model is None else str(model))
    machine = machine_facts() | {"torch": str(torch.__version__)}
    config = read_config(folder)
    options = ["--model", str(folder), "--quantize", quantize]
    load = Load(words, image_sides, decode_words, new_tokens, concurrency)
    records, contents = {name: Records(*pair) for name, pair in pairs.items()}, Contents(seed)
    for number in range(rounds):
        for name in list(pairs) if number % 2 == 0 else reversed(list(pairs)):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            run_turn(records[name], options, load, contents, most_others)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_cuda = num_gpus >= max(map(sum, pairs.values()))
    measured = Measurements(
        bench="splits",
        machine=machine,
        model=folder.name,
        config=config_to_dict(config),
        dtype=config.dtype,
        is_int8=quantize == "int8",
        is_cuda=is_cuda,
        units=num_gpus if is_cuda else len(os.sched_getaffinity(0)),
        splits=[one.measured() for one in records.values()],
    )
    if out is not None:
        out.write_bytes(msgspec.json.encode(measured))
    try:
        hardware = fit(measured, config, fit_on)
    except DisaggError as error:
        raise SystemExit(str(error)) from None
    compared = compare(measured, config, hardware, [name for name in pairs if name not in fit_on])
    result = msgspec.to_builtins(measured) | {
        "rounds": rounds,
        "fit_on": list(fit_on),
        "costs": hardware.costs(config.dtype),
        "predicted": [{**msgspec.to_builtins(one), "ratio": one.ratio} for one in compared],
    }
    conclude(result, report(result, measured, compared), as_json)
