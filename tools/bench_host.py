"""`recipes/bench.py host`: what a decode step costs beside the model, at short and long contexts."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import default_page_size
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.model import ForwardBatch
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.plan.presets import PRESETS
from tools.bench_machine import conclude, machine_facts, table

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.1},
    "all": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": dict.fromkeys(range(300), 0.5),
        "min_tokens": 10,
        "logprobs": 5,
        "seed": 1,
    },
}
PARTS = ("schedule", "batch", "sample", "rest")


class NoDecoder(nn.Module):
    """Hidden states at once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(1, 1)

    def forward(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(len(ids), 1)


class NoModel(nn.Module):
    """In place of a language model: the same logits at once, whatever the tokens. Attention is never called."""

    def __init__(self, config: ModelConfig, num_rows: int) -> None:
        super().__init__()
        self.config, self.model = config, NoDecoder()
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(num_rows, config.text.vocab_size, generator=generator) * 4

    def lm_head(self, x_BD: Tensor) -> Tensor:
        return self.logits[: len(x_BD)]

    def forward(self, ids: Tensor, positions: Tensor, batch: ForwardBatch, *_: Any, **__: Any) -> Tensor:
        return self.lm_head(ids)


def host_config() -> ModelConfig:
    """The published vocabulary and context, and keys and values of next to nothing."""
    config = PRESETS["30b-a3b"]
    text = dataclasses.replace(config.text, num_hidden_layers=1, num_key_value_heads=1, head_dim=2)
    return dataclasses.replace(config, text=text)


class Clock:
    """Seconds of this thread spent in some methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return real(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - started

        setattr(owner, method, timed)


def filled_engine(context: int, sequences: int, steps: int, params: dict[str, Any]) -> Engine:
    """An engine in which `sequences` requests of `context` tokens are decoding, and one more waits for pages."""
    config, size = host_config(), default_page_size(is_cuda=False)
    room = sequences * (steps // size + 2)
    pages = 2 * room + (sequences + 1) * (context // size + 2)
    options = EngineOptions(
        max_running=sequences + 1,
        max_prefill_tokens=2**22,
        chunk_tokens=2**22,
        kv_cache_gib=pages * size * 16 / 2**30,
    )
    engine = Engine(NoModel(config, sequences), eos_ids=frozenset({1}), options=options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(context)

    def add(name: str, length: int) -> None:
        prompt = torch.randint(2, config.text.vocab_size - 1000, (length,), generator=generator).tolist()
        engine.add(name, prompt, [], SamplingParams(max_new_tokens=steps, ignore_eos=True, **params))

    for number in range(sequences):
        add(str(number), context)
    while engine.scheduler.num_decoding < sequences:
        engine.step()
    pool = engine.scheduler.pool
    if pool.allocate(pool.num_free - room) is None:
        raise RuntimeError(f"{pool.num_free} pages are free, {room} of them are needed")
    add("waits", context + room * size)
    return engine


def measure(context: int, sequences: int, steps: int, params: dict[str, Any]) -> dict[str, float]:
    """Medians in ms of CPU time (other programs do not count) of a decode step and its parts."""
    engine, clock = filled_engine(context, sequences, steps + 16, params), Clock()
    for owner, method, name in (
        (engine.scheduler, "admit", "schedule"),
        (engine.scheduler, "schedule", "schedule"),
        (engine.scheduler, "remember", "schedule"),
        (engine.runner, "decode", "batch"),
        (engine.sampler, "sample", "sample"),
    ):
        clock.watch(owner, method, name)
    found: list[dict[str, float]] = []
    for _ in range(steps):
        clock.seconds.clear()
        started = time.thread_time()
        engine.has_work  # noqa: B018 - whoever drives the engine asks before each step
        events = engine.step()
        whole = time.thread_time() - started
        if len(events) != sequences:
            raise RuntimeError(f"{len(events)} events in a step of {sequences} sequences")
        rest = whole - sum(clock.seconds.values())
        found.append({"step": whole, **clock.seconds, "rest": rest})
    return {name: 1e3 * statistics.median(one.get(name, 0.0) for one in found) for name in ("step", *PARTS)}


def host(
    contexts: tuple[int, ...] = (1024, 32768, 131072),
    sequences: int = 32,
    steps: int = 40,
    settings: tuple[str, ...] = tuple(SETTINGS),
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Milliseconds of CPU time of a decode step without the model, by length of the context; docs/benchmarks.md.

    Args:
        contexts: Tokens of each prompt, random ones of the published vocabulary of 151,936.
        sequences: Requests that decode; one more waits for their pages.
        steps: How many are timed; medians.
        settings: Sampling of all requests: greedy, repetition (a repetition penalty alone), all (every option at once).
        as_json: Print the JSON line only.
    """
    unknown = sorted({*settings} - {*SETTINGS})
    if unknown or min(contexts) < 1 or min(sequences, steps) < 1:
        raise SystemExit(f"--settings takes {', '.join(SETTINGS)}, and all numbers are at least 1")
    torch.set_num_threads(1)
    machine, rows, results = machine_facts(), [], list[dict[str, Any]]()
    for name in settings:
        for context in contexts:
            found = measure(context, sequences, steps, SETTINGS[name])
            results.append({"settings": name, "context": context, **found})
            rows.append([name, f"{context:,}", *(f"{found[part]:.2f}" for part in ("step", *PARTS))])
            print(f"{name} {context}: {found['step']:.2f} ms", file=sys.stderr)
    result = {"bench": "host", "machine": machine, "sequences": sequences, "steps": steps, "results": results}
    conclude(result, table(["settings", "context", "step ms", *PARTS], rows), as_json)
