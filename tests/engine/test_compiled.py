"""The compiled decoder: as many graphs as predicted, none made afterwards, and the same answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.compiled import CompiledDecoder, graph_kinds
from qwen3vl_disagg.protocol.messages import Tokens
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import random_language_model, small_config

GREEDY = SamplingParams(max_new_tokens=4, logprobs=2)


@pytest.fixture(scope="module")
def pair():
    """The same requests answered without and with a compiled step, the latter under `fail_on_recompile`."""
    config = small_config()
    plain, model = random_language_model(config, seed=0), random_language_model(config, seed=0)
    requests = make_requests(plain, 9)
    expected = run(make_engine(plain), requests, GREEDY)
    torch._dynamo.reset()
    engine = make_engine(model, compile=True, prefix_cache=False)
    made = engine.runner.compiled.counts
    with torch.compiler.set_stance("fail_on_recompile"):
        answers = [run(engine, requests, GREEDY)]
        for tokens, running in ((1, 1), (3, 2), (17, 4)):
            engine.scheduler.limits = type(engine.scheduler.limits)(
                max_prefill_tokens=tokens, chunk_tokens=tokens, max_running=running
            )
            answers.append(run(engine, requests, GREEDY))
    yield config, engine, made, expected, answers
    torch._dynamo.reset()


def logprobs(events) -> torch.Tensor:
    return torch.tensor([e.logprob for event in events if isinstance(event, Tokens) for e in event.logprobs])


def test_as_many_graphs_as_predicted_and_no_more(pair):
    config, engine, made, _, _ = pair
    assert made.graphs == len(graph_kinds(config, has_kernels=False))
    assert made.breaks == 0
    assert engine.runner.compiled.counts == made


def test_the_same_answers_in_all_chunks_and_batches(pair):
    _, _, _, expected, answers = pair
    for answer in answers:
        for name, events in expected.items():
            assert token_ids(answer[name]) == token_ids(events)
            assert torch.allclose(logprobs(answer[name]), logprobs(events), atol=1e-4)


def test_text_alone_runs_no_graph_with_a_level(pair):
    """A fresh process of the compiler that has seen text only has the graphs without a level only."""
    config, _, _, _, _ = pair
    torch._dynamo.reset()
    model = random_language_model(config, seed=0)
    engine = make_engine(model)
    compiled = engine.runner.compiled = CompiledDecoder(model)
    text = {name: request for name, request in make_requests(model, 9).items() if not request[1]}
    run(engine, text, GREEDY)
    assert compiled.counts.graphs <= sum(not kind.has_level for kind in graph_kinds(config, has_kernels=False))


def test_kinds_of_graphs():
    """Experts everywhere and levels: 2 x 3 with kernels, 2 x 2 without."""
    config = small_config()
    assert {config.text.is_moe_layer(i) for i in range(config.text.num_hidden_layers)} == {True}
    assert len(graph_kinds(config, has_kernels=True)) == 6
    assert len(graph_kinds(config, has_kernels=False)) == 4
    assert graph_kinds(config, has_kernels=False, has_few_rows=True) == graph_kinds(config, has_kernels=True)
    mixed = replace(config, text=replace(config.text, mlp_only_layers=(2,)))  # behind the levels: 2 x 3 and 2
    assert len(graph_kinds(mixed, has_kernels=False, has_few_rows=True)) == 8
