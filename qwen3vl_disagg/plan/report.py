"""A plan for people and for programs: tables, formulas with their values, one JSON object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.settings import EngineSettings
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.plan.fit import Compared
from qwen3vl_disagg.plan.hardware import Cost, Hardware
from qwen3vl_disagg.plan.sizing import Split, Workload, chunk_tokens
from qwen3vl_disagg.plan.times import Term

UNITS: dict[Cost, tuple[str, float, str]] = {
    "byte": ("GB", 1e9, "GB/s of memory"),
    "flop": ("GFLOP", 1e9, "GFLOP/s"),
    "tower_flop": ("GFLOP", 1e9, "GFLOP/s"),
    "wire_byte": ("MB", 1e6, "MB/s between ranks"),
    "link_byte": ("MB", 1e6, "MB/s from encode rank"),
}
"""How a cost that is a rate is shown: unit of the amount, its size, unit of the rate. Others are seconds for each."""
MOST_ROWS = 16


@dataclass(frozen=True)
class Subject:
    """What is planned, and on what."""

    name: str
    config: ModelConfig
    dtype: str
    is_int8: bool
    hardware: Hardware
    folder: Path | None = None
    """Of a checkpoint, whose processor says what becomes of an image."""
    compared: Sequence[Compared] = ()
    costs: dict[Cost, float] = field(default_factory=dict)
    """Of a fit; empty without one."""


@dataclass(frozen=True)
class Report:
    """All that is shown. `replicas`: systems like it side by side; requests/s and tokens/s are of all of them."""

    subject: Subject
    workload: Workload
    splits: Sequence[Split]
    shown: Split
    """Whose formulas are shown: the best one, or the one asked for."""
    replicas: int
    best: Split
    """With the most requests/s of those that fit, if any does."""
    per_host: Split | None
    """The best split of a system on one host, where these are on several."""
    settings: EngineSettings

    def to_text(self) -> str:
        """The answer in a few lines: whether it fits, how many ranks of each kind, and what to expect of them."""
        split, subject = self.shown, self.subject
        lines = [
            f"{self._what()}: {'does not fit' if split.missing_bytes else 'fits'}",
            self._ranks(),
            self._short_memory(),
        ]
        if not split.missing_bytes:
            first, token = _number(split.loaded_first_token_s * 1e3), _number(split.loaded_token_s * 1e3)
            rate, tokens = (_number(each * self.replicas) for each in (split.requests_s, split.tokens_s))
            lines += [
                f"requests: {self._requests()}",
                f"expected under load: first token after {first} ms, then one every {token} ms",
                f"expected at most: {rate} requests/s, {tokens} tokens/s; {split.limited_by} ranks are the limit",
            ]
        if split.is_overloaded:
            lines.append("more requests arrive than that: they would wait longer and longer")
        if self.per_host is not None:
            lines.append(self._on_each_host(self.per_host))
        if subject.costs:
            lines.append(f"({subject.hardware.source})")
        lines.append("Computed, not measured; --details shows all splits and the formulas, --json everything.")
        return "\n".join(lines) + (f"\n\n{self._compared()}" if subject.compared else "")

    def to_details(self) -> str:
        """Every split, memory by what it is for, and the formulas with their values."""
        parts = [self._head(), self._table(), self._notes(), self._memory(), self._formulas()]
        if self.subject.costs:
            parts.insert(1, self._fit())
        return "\n\n".join(parts)

    def to_builtins(self) -> dict[str, Any]:
        """Plain JSON values; a limit that is none is null."""

        def split(one: Split) -> dict[str, Any]:
            figures = {name: value for name, value in vars(one).items() if isinstance(value, (int, float, bool))}
            memory = {"encode_memory": one.encode_memory, "language_memory": one.language_memory}
            cache = {"kv_cache": {"tokens": one.room.num_tokens, "bytes": one.room.num_bytes}}
            return _finite({"split": one.name, **figures, "limited_by": one.limited_by, **memory, **cache})

        subject = self.subject
        stages = {name: [self._term(term) for term in terms] for name, terms in self.shown.first_token.items()}
        return {
            "model": subject.name,
            "dtype": subject.dtype,
            "int8": subject.is_int8,
            "hardware": _finite(asdict(subject.hardware)),
            "workload": asdict(self.workload),
            "replicas": self.replicas,
            "splits": [split(one) for one in self.splits],
            "shown": self.shown.name,
            "formulas": {"first_token": stages, "token": [self._term(term) for term in self.shown.token]},
            "fitted_costs": subject.costs,
            "compared": [{**asdict(one), "ratio": one.ratio} for one in subject.compared],
        }

    def _term(self, term: Term) -> dict[str, Any]:
        cost = self.shown.costs[term.cost]
        return {**asdict(term), "seconds_each": cost, "seconds": term.amount * cost}

    # ---- text ----

    def _head(self) -> str:
        return (
            f"{self._what()}\n"
            f"({self.subject.hardware.source})\n"
            f"requests: {self._requests()}\n"
            "Computed by the formulas below, not measured."
        )

    def _what(self) -> str:
        subject, hardware = self.subject, self.subject.hardware
        ranks = self.shown.encode + self.shown.language
        what = f"{subject.name}, {subject.dtype}{', int8 decoder' if subject.is_int8 else ''}, {ranks} ranks on "
        units = "" if hardware.num_units is None else f", {hardware.num_units} of its units for all ranks"
        many = "" if self.replicas == 1 else f"; {self.replicas} such systems, requests/s and tokens/s of all"
        return f"{what}{hardware.name}{units}{many}"

    def _requests(self) -> str:
        load = self.workload
        images = f"{load.images} x {load.visual_tokens:,} visual + " if load.images else ""
        rate = f"{load.concurrency} at once" if load.requests_s is None else f"{load.requests_s:g} a second"
        each = "" if self.replicas == 1 else " for each system"
        return f"{images}{load.text_tokens:,} text tokens in, {load.output_tokens:,} out; {rate}{each}"

    def _ranks(self) -> str:
        """How many of each kind, and whether these are the better choice."""
        split, best = self.shown, self.best
        each = "" if self.replicas == 1 else " in each system"
        if best.missing_bytes:
            which = "no split of so many ranks fits"
        elif split is best:
            which = f"the best of {_count(len(self.splits), 'split')}"
        else:
            which = f"as asked for; the best of {_count(len(self.splits), 'split')} is {best.name}"
        return f"{_count(split.encode, 'encode rank')} + {_count(split.language, 'language rank')}{each}: {which}"

    def _short_memory(self) -> str:
        split, hardware = self.shown, self.subject.hardware
        encode, language = (_gib(sum(role.values())) for role in (split.encode_memory, split.language_memory))
        missing = f"; {_gib(split.missing_bytes)} GiB missing" if split.missing_bytes else ""
        room = f"{_gib(hardware.memory_bytes)} GiB each"
        if hardware.num_units is not None:
            room = f"{_gib(hardware.memory_bytes * hardware.num_units)} GiB for all"
        return f"memory: {encode} GiB on an encode rank, {language} on a language rank, of {room}{missing}"

    def _table(self) -> str:
        head = ["split", "GiB encode", "language", "running", "first token ms", "loaded", "ms per token", "loaded"]
        head += ["longest gap", "tokens/s", "requests/s encode", "language", "both", "limit"]
        rows = [self._row(split) for split in _some(self.splits, self.shown)]
        left_out = len(self.splits) - len(rows)
        more = f"\n({left_out} splits between these left out; --json has all)" if left_out else ""
        return _columns([head, *rows], (0, len(head) - 1)) + more

    def _row(self, split: Split) -> list[str]:
        times = (split.first_token_s, split.loaded_first_token_s, split.token_s, split.loaded_token_s, split.gap_s)
        first, loaded_first, token, loaded_token, gap = (_number(seconds * 1e3) for seconds in times)
        each = (split.tokens_s, split.encode_requests_s, split.language_requests_s, split.requests_s)
        rates = [_number(rate * self.replicas) for rate in each]
        limit = split.limited_by
        if split.is_overloaded:
            limit += ", overloaded"
        if split.missing_bytes:
            limit = f"does not fit: {_gib(split.missing_bytes)} GiB missing"
        memory = [_gib(sum(role.values())) for role in (split.encode_memory, split.language_memory)]
        name = f"{'*' if split is self.shown else ''}{split.name}"
        return [name, *memory, str(split.running), first, loaded_first, token, loaded_token, gap, *rates, limit]

    def _notes(self) -> str:
        split = self.shown
        lines = [
            f"* {split.name}: what follows is about this one. `loaded`: while the others run. `limit`: the side that "
            "takes fewer requests/s.",
            f"  Waiting for a free rank is left out. A language rank runs {self.settings.max_running} requests at "
            f"once, and `serve` would give it room for {split.room}; these requests need "
            f"{_gib(split.language_memory['keys and values'])} GiB of it.",
        ]
        if self.per_host is not None:
            lines.append(f"  {self._on_each_host(self.per_host)}")
        return "\n".join(lines)

    def _on_each_host(self, other: Split) -> str:
        hosts = (self.shown.encode + self.shown.language) * self.replicas // (other.encode + other.language)
        return (
            f"One system on each host instead (--replicas {hosts}): {other.name}, "
            f"{_number(other.requests_s * hosts)} requests/s, {_number(other.tokens_s * hosts)} "
            f"tokens/s, {_number(other.token_s * 1e3)} ms per token."
        )

    def _memory(self) -> str:
        split = self.shown
        experts = SizedModel(self.subject.config, 1).num_experts_of(split.language)
        rows = [["GiB on a rank", "encode", "language"]]
        for name in dict.fromkeys([*split.encode_memory, *split.language_memory]):
            sides = (split.encode_memory, split.language_memory)
            rows.append([name, *(_gib(side[name]) if name in side else "-" for side in sides)])
        spread = f"\nexperts of a layer on each language rank: {', '.join(map(str, experts))}" if any(experts) else ""
        return _columns(rows) + spread

    def _formulas(self) -> str:
        split, load, config = self.shown, self.workload, self.subject.config
        text, chunk = config.text, chunk_tokens(self.subject.hardware, self.settings)
        sections = [(f"first token ({stage})", terms) for stage, terms in split.first_token.items()] + [
            (f"a token of each of {split.running} requests", split.token)
        ]
        rows = [["", "formula", "amount", "at", "ms"]]
        for title, terms in sections:
            seconds = sum(term.amount * split.costs[term.cost] for term in terms)
            rows.append([f"{title}:", "", "", "", _number(seconds * 1e3)])
            rows += [["  " + term.what, term.formula, *_valued(term, split.costs[term.cost])] for term in terms]
        prompt = load.prompt_tokens
        return "\n".join(
            [
                f"D = {text.hidden_size}, layers {text.num_hidden_layers}, E = {text.num_experts} experts of F = "
                f"{text.moe_intermediate_size}, K = {text.num_experts_per_tok}, L = {split.language}, "
                f"n = {config.num_deepstack_levels}",
                _columns(rows, (0, 1, 3)),
                f"first token, loaded = first token, with prefill in {-(-prompt // chunk)} chunk(s) of {chunk} tokens "
                "and a token of the others after each",
                f"longest gap = a token + one chunk; tokens/s = {split.running} / token",
                "requests/s: encode = encode ranks / seconds of a request's images on one; language = 1 / (prefill of "
                f"a request, all ranks prefilling + {load.output_tokens} x token / {split.running})",
            ]
        )

    def _fit(self) -> str:
        rows = [["fitted", ""]]
        for cost, seconds in self.subject.costs.items():
            rows.append([cost.replace("_", " "), _each(cost, seconds, 1e3, "ms")])
        return _columns(rows) + (f"\n\n{self._compared()}" if self.subject.compared else "")

    def _compared(self) -> str:
        compared = [["split", "", "predicted", "measured", "ratio"]]
        compared += [
            [
                one.split,
                one.what,
                f"{one.predicted:.1f} {one.unit}",
                f"{one.measured:.1f} {one.unit}",
                f"{one.ratio:.2f}",
            ]
            for one in self.subject.compared
        ]
        return _columns(compared, (0, 1))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _valued(term: Term, cost: float) -> list[str]:
    """Amount, cost and milliseconds of a term."""
    unit, size, _ = UNITS.get(term.cost, ("", 1.0, ""))
    amount = f"{_number(term.amount / size)} {unit}".strip()
    return [amount, _each(term.cost, cost, 1e6, "us"), _number(term.amount * cost * 1e3)]


def _each(cost: Cost, seconds: float, per_second: float, unit: str) -> str:
    """A cost as a rate, or in `unit`s, of which there are `per_second`."""
    if not seconds:
        return "nothing"
    if cost in UNITS:
        _, size, rate = UNITS[cost]
        return f"{_number(1 / seconds / size)} {rate}"
    return f"{_number(seconds * per_second)} {unit}"


def _some(splits: Sequence[Split], shown: Split) -> list[Split]:
    """All, or those that tell most: small numbers of encode ranks, then fewer and fewer, around the one shown."""
    if len(splits) <= MOST_ROWS:
        return list(splits)
    last = splits[-1].encode
    wanted = {2**k for k in range(12)} | {3 * 2**k for k in range(11)} | {last, last + 1 - splits[0].encode}
    wanted |= {shown.encode + step for step in (-1, 0, 1)}
    return [split for split in splits if split.encode in wanted]


def _number(value: float) -> str:
    """Three digits that count."""
    if math.isinf(value):
        return "no limit"
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def _gib(num_bytes: float) -> str:
    return _number(num_bytes / 2**30)


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Aligned; columns of words to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        [v.ljust(width) if n in left else v.rjust(width) for n, (v, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value
