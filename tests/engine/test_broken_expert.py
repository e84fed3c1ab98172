"""One expert of the packaged checkpoint made infinite after loading: what does not meet it is answered as before."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.engine import EngineOptions
from qwen3vl_disagg.llm.llm import ChatResult
from tests.support.scenes import ask_scenes

SAMPLING = SamplingParams(max_new_tokens=6, logprobs=1)
TEXTS = ["Hello", "red", "2 + 2", "Is there a blue circle?", "Name a colour.", "Which shape is left?", "???", "Why?"]


@pytest.mark.parametrize("chunk_tokens", [64, 2048])
def test_questions_that_do_not_meet_a_broken_expert_are_answered_in_any_company(tmp_path, monkeypatch, chunk_tokens):
    options = EngineOptions(max_running=16, max_prefill_tokens=chunk_tokens, chunk_tokens=chunk_tokens)
    llm = LLM(engine_options=options)
    layers = llm.engine.runner.model.model.layers
    questions = [asked.messages() for asked in ask_scenes(tmp_path, seed=3, count=4)]
    questions += [[{"role": "user", "content": text}] for text in TEXTS]

    met: set[tuple[int, int]] = set()
    for number, layer in enumerate(layers):

        def watch(x, weights, ids, plan=None, run=layer.mlp.experts.forward, number=number):
            # Of the last layer nobody reads what becomes of tokens that are followed by others of the prompt.
            seen = ids[-1:] if number == len(layers) - 1 else ids
            met.update((number, expert) for expert in seen.unique().tolist())
            return run(x, weights, ids, plan)

        monkeypatch.setattr(layer.mlp.experts, "forward", watch)
    alone, meets = [], []
    for question in questions:
        met.clear()
        alone += llm.chat([question], SAMPLING)
        meets.append(set(met))
        llm.engine.scheduler.pool.__init__(llm.engine.scheduler.pool.num_pages, 16, True)  # every question whole
    monkeypatch.undo()

    half = len(questions) / 2
    counts = Counter(place for places in meets for place in places)
    middle = min((place for place in counts if place[0] < 2), key=lambda place: abs(counts[place] - half))
    last = min((place for place in counts if place[0] == 3), key=lambda place: abs(counts[place] - half))
    for layer_number, expert in (middle, last):
        experts = layers[layer_number].mlp.experts
        kept = [(weight, weight[expert].clone()) for weight in experts.local_weights()]
        for weight, _ in kept:
            weight.data[expert] = math.inf
        told = llm.chat_each(questions, SAMPLING)
        expected = [(layer_number, expert) in places for places in meets]
        assert 0 < sum(expected) < len(questions)
        for result, plain, is_met in zip(told, alone, expected, strict=True):
            if is_met:
                assert isinstance(result, DisaggError)
                assert (result.status, result.code) == (500, "engine_error")
            else:
                assert isinstance(result, ChatResult)
                assert (result.text, result.token_ids) == (plain.text, plain.token_ids)
        for weight, sound in kept:
            weight.data[expert] = sound
    healed = llm.chat(questions, SAMPLING)
    assert [result.token_ids for result in healed] == [result.token_ids for result in alone]
