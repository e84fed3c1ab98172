"""From measurements of a few splits of one model on one machine to the machine's figures.

Every time is a sum of amounts, known from the model and the split (`times.py`), each at an unknown cost. So the
costs are found by least squares, none below 0, each measurement weighted by 1 / itself (relative errors count):

* each stage of an image by itself, from the answers' `timings`: preprocessing and transfer, and the tower;
* all others together, from the times of decode steps and of first tokens (less those stages).

The least sum of squares without negative costs is the plain least squares solution over some subset of the costs, so
all subsets are tried (at most 2^9 here, each in closed form). Of those that explain the measurements equally well the
one with the fewest costs is taken, then the one that names earlier costs of `FITTED`.

What the splits cannot tell apart: with one number of language ranks above 1, an exchange and its hops keep the
proportion that they have on the built-in machine. `layer` is not fitted: for one model it is a part of `step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from qwen3vl_disagg.core.devices import DTYPES
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.model.config import ConfigError, ModelConfig
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.plan.hardware import BUILT_IN, Cost, Hardware
from qwen3vl_disagg.plan.times import (
    Place,
    Term,
    amounts,
    decode_terms,
    first_token_terms,
    image_terms,
    total_seconds,
)

FITTED: tuple[Cost, ...] = ("http", "step", "byte", "exchange", "request", "flop", "wire_byte", "item", "hop")
STAGES: dict[str, tuple[Cost, ...]] = {
    "preprocess": ("preprocess_row",),
    "encode": ("tower_flop", "tower"),
    "transfer": ("link", "link_byte"),
}
_SAME = 1e-6
"""Sums of squared relative errors that differ by less are the same."""


class MeasuredDecode(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`concurrency` text requests decoded together: milliseconds from token to token of each, tokens/s of all."""

    concurrency: int
    prompt_tokens: int
    new_tokens: int
    token_ms: float
    tokens_s: float


class MeasuredFirstToken(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One request alone: milliseconds until its first token, and of the stages of its images."""

    images: int
    visual_tokens: int
    """Of each image."""
    text_tokens: int
    """Of the prompt, visual tokens not counted."""
    ms: float
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    transfer_ms: float = 0.0


class MeasuredSplit(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    encode: int
    language: int
    decode: list[MeasuredDecode]
    first_token: list[MeasuredFirstToken]
    other_cores: float = 0.0
    """That other programs used meanwhile, at most."""

    @property
    def name(self) -> str:
        return f"{self.encode}+{self.language}"


class Measurements(msgspec.Struct, kw_only=True):
    """What `python recipes/bench.py splits --out FILE.json` writes. `config` is the checkpoint's `config.json`."""

    bench: Literal["splits"]
    machine: dict[str, Any]
    model: str
    config: dict[str, Any]
    dtype: str
    is_int8: bool
    is_cuda: bool
    units: int
    """Cores or GPUs that all ranks had together."""
    splits: list[MeasuredSplit]


def read_measurements(path: Path) -> tuple[Measurements, ModelConfig]:
    """The file and its model. InputError naming what is wrong where."""
    try:
        measured = msgspec.json.decode(path.read_bytes(), type=Measurements)
        config = ModelConfig.from_dict(measured.config)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", param="fit") from error
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
        raise InputError(f"{path}: no measurements of bench.py splits: {error}", param="fit") from error
    problems = []
    if measured.dtype not in DTYPES:
        problems.append(f"dtype {measured.dtype!r} is not one of {', '.join(DTYPES)}")
    if measured.units < 1:
        problems.append(f"units is {measured.units}")
    for split in measured.splits:
        times = [one.token_ms for one in split.decode] + [one.ms for one in split.first_token]
        counts = [split.encode, split.language, *(one.concurrency for one in split.decode)]
        if not times or min(times) <= 0 or min(counts) < 1:
            problems.append(f"split {split.name}: needs times above 0, and at least one rank and request")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}", param="fit")
    return measured, config


def places(measured: Measurements, config: ModelConfig, hardware: Hardware) -> dict[str, Place]:
    """Each measured split on a machine."""
    model = SizedModel(config, DTYPES[measured.dtype].itemsize, measured.is_int8, measured.is_cuda)
    return {split.name: Place(model, hardware, split.encode, split.language) for split in measured.splits}


def fit(measured: Measurements, config: ModelConfig, names: Sequence[str], base: Hardware | None = None) -> Hardware:
    """The machine, with costs from the splits `names`; what measurements do not touch (memory, links to other hosts)
    is `base`'s, or that of the built-in machine of the kind. InputError for fewer than two splits."""
    known = [split.name for split in measured.splits]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"no split {', '.join(unknown)} was measured; there are {', '.join(known)}", param="fit-on")
    used = [split for split in measured.splits if split.name in names]
    if len({split.name for split in used}) < 2:
        raise InputError(f"a fit needs at least two splits, got {', '.join(names) or 'none'}", param="fit-on")
    base = base or BUILT_IN["h200" if measured.is_cuda else "cpu"]
    units = None if measured.is_cuda else measured.units
    hardware = replace(base, num_units=units, layer_s=0.0, name=f"{base.name}, fitted on {' and '.join(names)}")
    where = places(measured, config, hardware)
    costs: dict[Cost, float] = {}
    for stage, of_stage in STAGES.items():
        rows = [row for split in used for row in _stage_rows(where[split.name], split, stage)]
        if rows:
            costs |= least_squares(rows, of_stage)
    rows = [row for split in used for row in _language_rows(where[split.name], split)]
    tied = base.hop_s / base.exchange_s if base.exchange_s else 0.0
    if len({split.language for split in used if where[split.name].is_lockstep}) > 1:
        costs |= least_squares(rows, FITTED)
    else:
        costs |= least_squares([_tie(row, tied) for row in rows], FITTED)
        costs["hop"] = tied * costs["exchange"]
    source = f"{measured.machine.get('cpu', 'a machine')}, measured {measured.machine.get('date', 'some day')}"
    return hardware.with_costs(costs, measured.dtype, source=f"{source}; what was not measured: {base.source}")


@dataclass(frozen=True)
class Row:
    """One measurement: amounts at unknown costs add up to `seconds`."""

    amounts: dict[Cost, float]
    seconds: float


def _tie(row: Row, hops: float) -> Row:
    """The same with `hops` exchanges in place of each hop."""
    exchange = row.amounts.get("exchange", 0.0) + hops * row.amounts.get("hop", 0.0)
    return Row({**row.amounts, "exchange": exchange, "hop": 0.0}, row.seconds)


def _stage_rows(place: Place, split: MeasuredSplit, stage: str) -> list[Row]:
    """What the answers' timings say of one stage."""
    rows = []
    for one in split.first_token:
        seconds = getattr(one, f"{stage}_ms") / 1e3
        if one.images and seconds > 0:
            found = amounts(image_terms(place, one.images, one.visual_tokens))
            rows.append(Row({cost: found[cost] for cost in STAGES[stage]}, seconds))
    return rows


def _language_rows(place: Place, split: MeasuredSplit) -> list[Row]:
    """Decode steps, and first tokens without what `timings` tell of the images."""
    rows = [Row(amounts(_decode(place, one)), one.token_ms / 1e3) for one in split.decode]
    staged = {cost for of_stage in STAGES.values() for cost in of_stage}
    for one in split.first_token:
        found = amounts(_first_token(place, one))
        seconds = (one.ms - one.preprocess_ms - one.encode_ms - one.transfer_ms) / 1e3
        if seconds > 0:
            rows.append(Row({cost: amount for cost, amount in found.items() if cost not in staged}, seconds))
    return rows


def _decode(place: Place, one: MeasuredDecode) -> list[Term]:
    return decode_terms(place, one.concurrency, one.prompt_tokens + one.new_tokens / 2)


def _first_token(place: Place, one: MeasuredFirstToken) -> list[Term]:
    stages = first_token_terms(place, one.images, one.visual_tokens, one.text_tokens)
    return [term for terms in stages.values() for term in terms]


def least_squares(rows: Sequence[Row], costs: Sequence[Cost]) -> dict[Cost, float]:
    """The costs, none negative, with the least sum of squared relative errors; see the top of this file."""
    matrix = np.array([[row.amounts.get(cost, 0.0) / row.seconds for cost in costs] for row in rows])
    norms = np.linalg.norm(matrix, axis=0)
    present = [column for column in range(len(costs)) if norms[column] > 0]
    ones = np.ones(len(rows))
    best, found = float(len(rows)), dict.fromkeys(costs, 0.0)
    for count in range(1, len(present) + 1):
        for subset in combinations(present, count):
            columns = matrix[:, subset] / norms[list(subset)]
            solution, _, rank, _ = np.linalg.lstsq(columns, ones, rcond=1e-9)
            if rank < count or (solution < 0).any():
                continue  # a smaller subset says the same, or another one is right
            error = float(((columns @ solution - 1) ** 2).sum())
            if error < best - _SAME:
                best = error
                found = dict.fromkeys(costs, 0.0)
                found |= {costs[c]: float(v / norms[c]) for c, v in zip(subset, solution, strict=True)}
    return found


@dataclass(frozen=True)
class Compared:
    """A prediction beside its measurement."""

    split: str
    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def compare(measured: Measurements, config: ModelConfig, hardware: Hardware, names: Sequence[str]) -> list[Compared]:
    """What the machine should show for these splits, beside what was measured."""
    where, costs = places(measured, config, hardware), hardware.costs(measured.dtype)
    found: list[Compared] = []
    for split in measured.splits:
        if split.name not in names:
            continue
        place = where[split.name]
        for decode in split.decode:
            token_s, count = total_seconds(_decode(place, decode), costs), decode.concurrency
            found += [
                Compared(split.name, f"per token, {count} requests", "ms", token_s * 1e3, decode.token_ms),
                Compared(split.name, f"decode, {count} requests", "tokens/s", count / token_s, decode.tokens_s),
            ]
        for one in split.first_token:
            size = f"{one.images} x {one.visual_tokens} visual" if one.images else "no image"
            what = f"first token, {one.text_tokens} text tokens, {size}"
            predicted = total_seconds(_first_token(place, one), costs) * 1e3
            found.append(Compared(split.name, what, "ms", predicted, one.ms))
    return found
