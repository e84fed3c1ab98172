"""A long mixed run of the compiled system: not one graph more than predicted, not one break."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.engine import EngineOptions
from qwen3vl_disagg.kernels.build import load
from qwen3vl_disagg.kernels.compiling import GraphCounts
from tests.support.images import uri

NUM_REQUESTS = 200


def noise(width: int, height: int, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return uri(buffer.getvalue())


def conversations(count: int):
    """Text alone, or up to 3 images of any size with it, and a number of tokens for each."""
    rng = random.Random(17)
    messages, params = [], []
    for number in range(count):
        sizes = [(rng.randint(20, 260), rng.randint(20, 260)) for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))]
        images = [
            {"type": "image_url", "image_url": {"url": noise(width, height, seed=10 * number + i)}}
            for i, (width, height) in enumerate(sizes)
        ]
        words = " ".join(rng.choice(["red", "round", "what", "is", "left"]) for _ in range(rng.randint(1, 120)))
        messages.append([{"role": "user", "content": [*images, {"type": "text", "text": words}]}])
        params.append(SamplingParams(max_new_tokens=rng.randint(1, 24), temperature=0.0, ignore_eos=True, logprobs=1))
    return messages, params


@pytest.mark.acceptance
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_200_requests(dtype):
    messages, params = conversations(NUM_REQUESTS)
    limits = {"chunk_tokens": 48, "max_prefill_tokens": 300, "prefix_cache": False}
    plain = LLM(dtype=dtype, device="cpu", engine_options=EngineOptions(**limits)).chat(messages, params)
    torch._dynamo.reset()
    try:
        llm = LLM(dtype=dtype, device="cpu", engine_options=EngineOptions(**limits, compile=True))
        compiled = llm.engine.runner.compiled
        before = GraphCounts.now()
        has_kernels = dtype == "bfloat16" and load() is not None
        assert len(compiled.kinds) == (6 if has_kernels else 4)
        with torch.compiler.set_stance("fail_on_recompile"):
            results = llm.chat(messages, params)
        assert GraphCounts.now() == before
        assert compiled.counts == GraphCounts(len(compiled.kinds) + 1, 0)  # and the tower's block
    finally:
        torch._dynamo.reset()
    assert [len(result.token_ids) for result in results] == [param.max_new_tokens for param in params]
    equal = sum(a.token_ids == b.token_ids for a, b in zip(plain, results, strict=True))
    print(f"{dtype}: {len(compiled.kinds)} graphs and the tower's, {equal} of {NUM_REQUESTS} answers equal to eager")
    assert equal >= NUM_REQUESTS * (0.99 if dtype == "float32" else 0.5)
