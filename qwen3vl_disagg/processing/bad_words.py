"""Texts that an answer must not have, as the engine takes them: by the ids of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from qwen3vl_disagg.core.sampling_params import SamplingParams
from qwen3vl_disagg.processing.tokenizer import Tokenizer


def with_ids(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """InputError where that makes more ids than there may be."""
    if not any(isinstance(word, str) for word in sampling.bad_words):
        return sampling
    return msgspec.structs.replace(sampling, bad_words=word_ids(sampling.bad_words, tokenizer))


def word_ids(words: Sequence[str | list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Of each text the ids as it begins an answer, and with a blank before it, as within a text. (vLLM leaves the
    second out where it has another number of tokens.)"""
    found: list[list[int]] = []
    for word in words:
        texts = [word.lstrip(), f" {word.lstrip()}"] if isinstance(word, str) and word.strip() else [word]
        found += [text if isinstance(text, list) else tokenizer.encode(text) for text in texts]
    return [list(ids) for ids in dict.fromkeys(map(tuple, found))]
