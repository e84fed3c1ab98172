"""`recipes/bench.py grammars`: what a decode step costs where some of the requests have a grammar."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack
from typing import Annotated, Any

import torch
import tyro

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.engine import Engine
from qwen3vl_disagg.engine.grammars import Grammars
from tools.bench_engine import folder_to_serve
from tools.bench_machine import conclude, machine_facts, table

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "size": {"type": "integer", "minimum": 0, "maximum": 99999},
        "kind": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 3},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}
ENDLESS = Grammar.of_schema({"type": "array", "items": ITEM, "minItems": 10_000})
WARM_UP = 24


class Contestant:
    """An engine over the same weights, in which `batch` requests decode, `bound` of them with a grammar."""

    def __init__(self, llm: LLM, batch: int, bound: int, num_tokens: int) -> None:
        grammars = Grammars.of(lambda: llm.processor.tokenizer, llm.config, llm.engine.eos_ids)
        self._engine = Engine(
            llm.engine.runner.model, eos_ids=llm.engine.eos_ids, options=llm.engine.options, grammars=grammars
        )
        self._batch = batch
        self.walls: list[float] = []
        self.cpus: list[float] = []
        ids = llm.processor.tokenizer.encode("".join(f"colour {i} " for i in range(20)))
        closing = {token_id: 4.0 for text in '"},' for token_id in llm.processor.tokenizer.encode(text)}
        for number in range(batch):
            sampling = SamplingParams(
                max_new_tokens=num_tokens,
                temperature=1.0,
                seed=number,
                ignore_eos=True,
                logit_bias=closing,
                grammar=ENDLESS if number < bound else None,
            )
            self._engine.add(str(number), ids, [], sampling)
        while self._engine.outlook(0).decode < batch:
            if not self._engine.step():
                self._engine.wait(1.0)

    def step(self) -> None:
        """Steps in which a request was left out count as they are: its token comes later."""
        wall, cpu = time.perf_counter(), time.process_time()
        num_tokens = 0
        while num_tokens < self._batch:
            num_tokens += len(self._engine.step())
        self.walls.append(time.perf_counter() - wall)
        self.cpus.append(time.process_time() - cpu)


def grammars(
    preset: str = "mid",
    batch: int = 8,
    bound: tuple[int, ...] = (0, 4),
    steps: int = 200,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Milliseconds of a decode step with and without grammars; engines over the same weights take turns step by step.

    Args:
        preset: Checkpoint to make: mid, or another of `tools/make_checkpoint.py`.
        batch: Requests that decode.
        bound: How many of them have a grammar, one engine for each number; the first is what others are compared with.
        steps: How many are timed of each; medians.
        as_json: Print the JSON line only.
    """
    if min(batch, steps) < 1 or not bound or not 0 <= min(bound) <= max(bound) <= batch:
        raise SystemExit("--bound takes numbers up to --batch, and all others are at least 1")
    machine, results, rows = machine_facts(), list[dict[str, Any]](), []
    with ExitStack() as stack:
        llm = LLM(folder_to_serve(stack, preset), max_running=batch)
        contestants = [Contestant(llm, batch, number, WARM_UP + steps + 2) for number in bound]
        for number in range(WARM_UP + steps):
            for contestant in contestants[:: 1 if number % 2 else -1]:
                contestant.step()
            if number % 50 == 0:
                print(f"step {number}", file=sys.stderr)
    first = contestants[0]
    for number, one in zip(bound, contestants, strict=True):
        wall, cpu = (1e3 * statistics.median(times[WARM_UP:]) for times in (one.walls, one.cpus))
        ratios = [mine / other for mine, other in zip(one.walls[WARM_UP:], first.walls[WARM_UP:], strict=True)]
        found = {"bound": number, "wall_ms": wall, "cpu_ms": cpu, "ratio": statistics.median(ratios)}
        results.append(found)
        rows.append([str(number), f"{wall:.2f}", f"{cpu:.2f}", f"{found['ratio']:.3f}"])
    result = {
        "bench": "grammars",
        "machine": machine,
        "preset": preset,
        "batch": batch,
        "threads": torch.get_num_threads(),
    }
    conclude(
        result | {"steps": steps, "results": results},
        table(["with a grammar", "step ms", "CPU ms", "ratio"], rows),
        as_json,
    )
