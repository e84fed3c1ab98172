"""Grammars over the packaged tokenizer, a random model of its vocabulary, and answers that end."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.engine import Engine, EngineEvent, EngineOptions
from qwen3vl_disagg.engine.grammars import Grammars
from qwen3vl_disagg.engine.llguidance_matcher import LlguidanceCompiler
from qwen3vl_disagg.engine.masks import Compiler, Mask
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.processing.tokenizer import IM_END, IMAGE_PAD, VIDEO_PAD, Tokenizer
from qwen3vl_disagg.protocol.messages import Finished, RequestFailed, Tokens
from tests.support.random_model import random_language_model, small_config

VOCAB_SIZE = 500
"""More than the tokenizer has."""


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(resolve_model_folder(None))


@functools.cache
def model() -> Qwen3MoeForCausalLMWithDeepStack:
    config = small_config()
    ids = {"image_token_id": tokenizer().token_id(IMAGE_PAD), "video_token_id": tokenizer().token_id(VIDEO_PAD)}
    text = replace(config.text, vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    return random_language_model(replace(config, text=text, **ids), seed=0)


def end_ids() -> frozenset[int]:
    return frozenset({tokenizer().token_id(IM_END), tokenizer().token_id("<|endoftext|>")})


@functools.cache
def compiler() -> LlguidanceCompiler:
    banned = [tokenizer().token_id(name) for name in (IMAGE_PAD, VIDEO_PAD)]
    return LlguidanceCompiler(tokenizer(), VOCAB_SIZE, eos_ids=end_ids(), banned_ids=banned)


class Scripted:
    """Takes `red pen` alone; `slow` is waited for before each mask but the first."""

    def __init__(self, slow: threading.Event | None = None, broken_at: int = -1) -> None:
        self._ids = [*tokenizer().encode("red pen"), min(end_ids())]
        self._slow, self._broken_at, self._at = slow, broken_at, 0

    def mask(self) -> Mask:
        if self._slow is not None and self._at:
            assert self._slow.wait(30)
        if self._at == self._broken_at:
            raise InputError("too much", param="grammar", code="grammar_too_complex")
        bits = np.zeros_like(compiler().banned)
        bits[self._ids[self._at] // 8] = 1 << self._ids[self._at] % 8
        return Mask(bits)

    def consume(self, token_id: int) -> None:
        assert token_id == self._ids[self._at]
        self._at += 1

    def copy(self) -> Scripted:
        return copy.copy(self)


def make_engine(compile: Compiler | None = None, **options) -> Engine:
    defaults = {"max_running": 8, "max_prefill_tokens": 40, "chunk_tokens": 8, "page_size": 4, "kv_cache_gib": 0.02}
    return Engine(
        model(),
        eos_ids=end_ids(),
        options=EngineOptions(**{**defaults, **options}),
        grammars=Grammars(lambda: compile or compiler()),
    )


def to_an_end(**more) -> SamplingParams:
    """Temperature 1, and what ends strings, lists, objects and the answer is likelier than by chance."""
    bias = {token_id: 5.0 for text in '"]}' for token_id in tokenizer().encode(text)} | dict.fromkeys(end_ids(), 3.0)
    return SamplingParams(**{"max_new_tokens": 300, "temperature": 1.0, "seed": 1, "logit_bias": bias, **more})


def run(engine: Engine, requests: Mapping[str, tuple[list[int], SamplingParams]]) -> dict[str, list[EngineEvent]]:
    """Drive an engine to the end; each request's events."""
    events: dict[str, list[EngineEvent]] = {name: [] for name in requests}
    for name, (ids, sampling) in requests.items():
        engine.add(name, ids, [], sampling)
    for _ in range(5000):
        if engine.is_empty:
            return events
        new = engine.step()
        for event in new:
            events[event.request_id].append(event)
        if not new and not engine.has_work:
            assert engine.wait(30.0), "nothing moves"
    raise AssertionError("the engine does not come to an end")


def answer(events: Iterable[EngineEvent]) -> tuple[list[int], str]:
    """Its tokens, and why it ended; of one that failed the error's code."""
    ids = [i for event in events if isinstance(event, Tokens) for i in event.token_ids]
    [end] = [event for event in events if isinstance(event, (Finished, RequestFailed))]
    return ids, end.finish_reason if isinstance(end, Finished) else end.failure.code


def text_of(ids: list[int]) -> str:
    """Without the end token."""
    return tokenizer().decode([i for i in ids if i not in end_ids()])
