"""Texts that an answer must not have, as the engine takes them: by the ids of their tokens."""

from __future__ import annotations

import msgspec

from qwen3vl_disagg.core.sampling_params import SamplingParams
from qwen3vl_disagg.processing.tokenizer import Tokenizer


def with_ids(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """Of each text the ids as it begins an answer, and with a blank before it, as within a text. (vLLM leaves the
    second out where it has another number of tokens.)"""
    if not any(isinstance(word, str) for word in sampling.bad_words):
        return sampling
    found: list[list[int]] = []
    for word in sampling.bad_words:
        texts = [word.lstrip(), f" {word.lstrip()}"] if isinstance(word, str) and word.strip() else [word]
        found += [text if isinstance(text, list) else tokenizer.encode(text) for text in texts]
    return msgspec.structs.replace(sampling, bad_words=[list(ids) for ids in dict.fromkeys(map(tuple, found))])
