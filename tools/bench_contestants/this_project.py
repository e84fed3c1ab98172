"""This project, through what it offers to others: `LLM`, `Engine.add` and `Engine.step`, `EncodeWorker.encode`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from qwen3vl_disagg import LLM
from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.core.devices import DTYPES, resolve_compile
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.encode.worker import EncodeWorker, Pixels
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.protocol.messages import RequestFailed, Tokens
from tools.bench_contestants.worker import Setup, serve
from tools.checkpoints import random_language_model, random_vision_model


def decode_stamps(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
    """When each request's tokens came, decoded greedily without end tokens."""
    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    stamps: dict[str, list[float]] = {}
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, [], sampling)
        stamps[str(number)] = []
    while not engine.is_empty:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if isinstance(event, RequestFailed):
                raise RuntimeError(event.failure.message)
            if isinstance(event, Tokens):
                stamps[event.request_id] += [now] * len(event.token_ids)
    return list(stamps.values())


class ThisProject:
    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.device = torch.device(setup.device)
        if setup.is_random:
            self.engine, self.worker = _random(setup)
        else:
            options: dict[str, Any] = {"device": setup.device, "compile": setup.compile, "quantize": setup.quantize}
            self.llm = LLM(setup.folder, **options, task="embed" if setup.task == "embed" else "auto")
            self.engine, self.worker = self.llm.engine, self.llm.transfer.worker

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "compile": self.setup.compile, "quantize": self.setup.quantize}

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        return decode_stamps(self.engine, prompts, new_tokens)

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        return self.decode([prompt], 1)[0][0] - started

    def vision(self, grid: tuple[int, int, int], patch_dim: int, seed: int) -> float:
        patches = torch.randn(grid[0] * grid[1] * grid[2], patch_dim, generator=torch.Generator().manual_seed(seed))
        started = time.perf_counter()
        [result] = self.worker.encode([Pixels(patches, grid, 0.0)], [self.worker.config.image_token_id])
        if isinstance(result, Exception):
            raise result
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def embed(self, files: list[str]) -> dict[str, Any]:
        started = time.perf_counter()
        found = self.llm.embed([{"image": file} for file in files])
        return {"seconds": time.perf_counter() - started, "first": found[0].embedding}


def _random(setup: Setup) -> tuple[Engine, EncodeWorker]:
    """The same engine and worker around weights made on the device."""
    folder, config = Path(setup.folder), read_config(setup.folder)
    processor, dtype = Processor.from_folder(folder, config), DTYPES[config.dtype]
    language = random_language_model(config, dtype, setup.device, 0)
    vision = random_vision_model(config, dtype, setup.device, 0)
    options = EngineOptions(compile=resolve_compile(setup.compile, torch.device(setup.device)))
    engine = Engine(language, eos_ids=processor.generation.eos_token_ids, options=options)
    return engine, EncodeWorker(vision, processor.image, config)


if __name__ == "__main__":
    serve(ThisProject)
