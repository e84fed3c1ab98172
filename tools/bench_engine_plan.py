"""What `recipes/bench.py engine` measures, in which order, and what it keeps of it."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_disagg.model.config import ModelConfig
from tools.bench_ceilings import Rates, Work, decode_step, image, prefill
from tools.bench_contestants.client import Answer, Process, ask_alone
from tools.bench_stats import decode_rate, whole_rate
from tools.training.make_tokenizer import SPECIAL_TOKENS

ANSWER_S = 900.0
MACHINE = "machine"
"""Takes part in every round like a contestant: it measures the rates that the ceilings stand on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The same measurements for all contestants. Figures are tokens/s, those of `image` milliseconds."""

    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int
    image_side: int
    rounds: int
    seed: int = 0

    def commands(self, config: ModelConfig, number: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The measurements of a round: each one's commands, of which the last counts. Prompts differ, so that no cache
        of prefixes helps.

        Prefill and image are done twice: while others had their turn, a virtual machine's host may have taken memory
        away that nobody used, and whoever is first pays for that.
        """
        source = random.Random(f"{self.seed} {number}")
        first_special = config.vision_start_token_id - SPECIAL_TOKENS.index("<|vision_start|>")

        def prompt(length: int) -> list[int]:
            return [source.randrange(first_special) for _ in range(length)]

        for batch in self.batches:
            prompts = [prompt(self.prompt_tokens) for _ in range(batch)]
            yield f"decode {batch}", [{"do": "decode", "prompts": prompts, "new_tokens": self.new_tokens}]
        yield "prefill", [{"do": "prefill", "prompt": prompt(self.prefill_tokens)} for _ in range(2)]
        vision = {"do": "vision", "grid": self.grid(config), "patch_dim": config.vision.patch_dim}
        yield "image", [{**vision, "seed": seed} for seed in (2 * number, 2 * number + 1)]

    def grid(self, config: ModelConfig) -> tuple[int, int, int]:
        """Of a square image: frames, height and width in patches."""
        side = self.image_side // config.vision.patch_size
        return 1, side, side

    def figure(self, measurement: str, seconds: float) -> float:
        """From the seconds of one prompt, of one image, or of one step of a batch."""
        if measurement == "image":
            return seconds * 1e3
        tokens = self.prefill_tokens if measurement == "prefill" else int(measurement.split()[1])
        return tokens / seconds

    def measured(self, measurement: str, result: Any) -> float:
        """The figure of what a contestant answered."""
        return decode_rate(result) if measurement.startswith("decode") else self.figure(measurement, result)

    def work(self, config: ModelConfig, weight_bytes: float) -> dict[str, Work]:
        """The least that each measurement costs; for decoding, the step half-way through."""
        context = self.prompt_tokens + self.new_tokens / 2
        work = {
            f"decode {batch}": decode_step(config.text, batch=batch, context=context, weight_bytes=weight_bytes)
            for batch in self.batches
        }
        work["prefill"] = prefill(config.text, tokens=self.prefill_tokens, weight_bytes=weight_bytes)
        work["image"] = image(config, self.grid(config))
        return work

    def ceilings(self, config: ModelConfig, weight_bytes: float, rates: Rates) -> dict[str, float]:
        """The figure of each measurement if nothing but that work were done."""
        return {name: self.figure(name, work.seconds(rates)) for name, work in self.work(config, weight_bytes).items()}


@dataclass
class Record:
    """What was seen of one contestant."""

    facts: dict[str, Any]
    figures: dict[str, list[float]] = field(default_factory=dict)
    whole: dict[str, list[float]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    private_bytes: int = 0
    peak_bytes: int = 0

    def note(self, measurement: str, value: float) -> None:
        self.figures.setdefault(measurement, []).append(value)

    def note_memory(self, used: Mapping[str, int]) -> None:
        self.private_bytes = max(self.private_bytes, used["private"])
        self.peak_bytes = max(self.peak_bytes, used["peak"])

    def best_rates(self, dtype: str) -> Rates:
        """Of the machine: a ceiling is the best that was ever seen, whatever the way."""
        reads = [value for name, values in self.figures.items() if name.startswith("read") for value in values]
        return Rates(max(reads) * 1e9, max(self.figures[f"matmul {dtype}"]) * 1e9)

    def summary(self, ceilings: Mapping[str, float]) -> dict[str, Any]:
        """For the JSON line and the tables."""
        medians = {name: statistics.median(values) for name, values in self.figures.items()}
        parts = {
            name: ceilings[name] / value if name == "image" else value / ceilings[name]
            for name, value in medians.items()
        }
        return {
            "facts": self.facts,
            "median": medians,
            "of_ceiling": parts,
            "ceiling": dict(ceilings),
            "rounds": self.figures,
            "with_prefill": {name: statistics.median(values) for name, values in self.whole.items()},
            **self.shares(),
            "private_mb": self.private_bytes / 1e6,
            "peak_mb": self.peak_bytes / 1e6,
        }

    def shares(self) -> dict[str, float]:
        """Cores that were busy while it was measured, on average over time."""
        wall = sum(answer.wall_s for answer in self.answers)
        names = ("cores", "idle_cores", "other_cores")
        return {name: sum(getattr(a, name) * a.wall_s for a in self.answers) / wall for name in names}


def run(plan: Plan, config: ModelConfig, processes: Mapping[str, Process], records: Mapping[str, Record]) -> None:
    """Round 0 warms up and does not count. Each measurement goes once around, one way in odd rounds, back in even."""
    everyone = list(processes.values())
    for number in range(plan.rounds + 1):
        names = [name for name in records if name != MACHINE]
        for measurement, commands in plan.commands(config, number):
            for name in names if number % 2 else reversed(names):
                for command in commands:
                    answer = ask_alone(processes[name], everyone, ANSWER_S, **command)
                if number:
                    take(plan, records[name], measurement, answer)
        rates = ask_alone(processes[MACHINE], everyone, ANSWER_S, do="rates")
        for way, value in rates.result.items():
            records[MACHINE].note(way, value)
        for name in names:
            records[name].note_memory(processes[name].memory())
        print(f"round {number} of {plan.rounds}" if number else "warm", file=sys.stderr)


def take(plan: Plan, record: Record, measurement: str, answer: Answer) -> None:
    """Keep a measurement."""
    record.note(measurement, plan.measured(measurement, answer.result))
    record.answers.append(answer)
    if measurement.startswith("decode") and plan.new_tokens > 1:
        record.whole.setdefault(measurement, []).append(whole_rate(answer.result))
