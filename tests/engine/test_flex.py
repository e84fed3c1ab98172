"""FlexAttention in an engine whose decoder is compiled: graphs as predicted, answers as without; and the choice."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.compiled import graph_kinds
from qwen3vl_disagg.engine.runner import resolve_attention
from qwen3vl_disagg.model.flex import flex_kinds
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import random_language_model, small_config

GREEDY = SamplingParams(max_new_tokens=4)


def test_compiled_engine():
    config = small_config()
    plain, model = random_language_model(config, seed=0), random_language_model(config, seed=0)
    requests = make_requests(plain, 7)
    expected = run(make_engine(plain), requests, GREEDY)
    torch._dynamo.reset()
    engine = make_engine(model, compile=True, attention="flex")
    made = engine.runner.compiled.counts
    assert made.graphs == len(graph_kinds(config, has_kernels=False)) + len(flex_kinds("cpu", 4, 4))
    assert made.graphs == len(engine.runner.compiled.kinds)
    assert made.breaks == 0
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens, running in ((40, 4), (1, 1), (3, 2), (17, 4)):
            engine.scheduler.limits = type(engine.scheduler.limits)(
                max_prefill_tokens=tokens, chunk_tokens=tokens, max_running=running
            )
            answer = run(engine, requests, GREEDY)
            assert {n: token_ids(e) for n, e in answer.items()} == {n: token_ids(e) for n, e in expected.items()}
    assert engine.runner.compiled.counts == made
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("choice", "device", "compile", "page_size", "impl"),
    [
        ("auto", "cpu", True, 16, None),
        ("auto", "cuda", True, 16, "flex"),
        ("auto", "cuda", False, 16, "sdpa"),
        ("auto", "cuda", True, 10, "sdpa"),
        ("flex", "cuda", False, 16, "flex"),
        ("flex", "cpu", False, 3, "flex"),
        ("sdpa", "cuda", True, 16, "sdpa"),
        ("kernel", "cpu", False, 16, "kernel"),
    ],
)
def test_choice(choice, device, compile, page_size, impl):
    arguments = {"compile": compile, "page_size": page_size, "head_dim": 64}
    assert resolve_attention(choice, torch.device(device), **arguments) == impl


@pytest.mark.parametrize(("choice", "page_size", "message"), [("flex", 10, "not 10"), ("kernel", 16, "on cuda")])
def test_choice_that_the_device_cannot_serve(choice, page_size, message):
    with pytest.raises(ValueError, match=message):
        resolve_attention(choice, torch.device("cuda"), compile=True, page_size=page_size, head_dim=64)
