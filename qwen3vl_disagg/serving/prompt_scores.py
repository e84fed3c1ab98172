"""Log probabilities of a prompt's tokens on their way out: vLLM's form, and that of OpenAI's older completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from qwen3vl_disagg.core.errors import InputError, ServerError
from qwen3vl_disagg.processing import Tokenizer
from qwen3vl_disagg.protocol.messages import PromptLogprobs
from qwen3vl_disagg.serving.errors import encoded

MIN_LOGPROB = -9999.0
"""OpenAI's stand-in for a probability of zero: JSON has no -Infinity."""
MAX_SCORES = 2**18
"""Numbers that one request may ask for: of each token of its prompts its own, and the alternatives."""


class PromptToken(msgspec.Struct, kw_only=True):
    """A token that could stand at a place of the prompt. `rank`: 1 is the most likely one."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class Score:
    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass
class PromptScores:
    """What has come of one prompt's log probabilities."""

    prompt_ids: Sequence[int]
    parts: list[PromptLogprobs] = field(default_factory=list)

    def scores(self) -> Iterator[Score]:
        """Of each token but the first. ServerError if a part is missing."""
        index = 1
        for part in self.parts:
            own, ranks, top_ids, top = (
                np.frombuffer(data, kind).tolist()
                for data, kind in ((part.own, "<f4"), (part.ranks, "<i4"), (part.top_ids, "<i4"), (part.top, "<f4"))
            )
            if part.index != index:
                break
            num_top = len(top) // max(1, len(own))
            for r, (logprob, rank) in enumerate(zip(own, ranks, strict=True)):
                best = slice(r * num_top, (r + 1) * num_top)
                pairs = list(zip(top_ids[best], top[best], strict=True))
                yield Score(self.prompt_ids[index + r], logprob, rank, pairs)
            index += len(own)
        if index != len(self.prompt_ids):
            raise ServerError("a part of the prompt's log probabilities was lost")

    def by_token(self, tokenizer: Tokenizer) -> list[dict[str, PromptToken] | None]:
        """vLLM's `prompt_logprobs`: for each token, None for the first, token id -> what is said of it; encoded."""
        found: list[dict[str, PromptToken] | None] = [None]
        for score in self.scores():
            named = {token_id: (logprob, n) for n, (token_id, logprob) in enumerate(score.top, 1)}
            named = {score.token_id: (score.logprob, score.rank), **named}
            told = {
                str(token_id): PromptToken(
                    logprob=max(logprob, MIN_LOGPROB), rank=rank, decoded_token=token_text(tokenizer, token_id)
                )
                for token_id, (logprob, rank) in named.items()
            }
            found.append(encoded(told))
        return found


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """What a token stands for; where it is a part of a character U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def check_num_scores(prompts: Sequence[Sequence[int]], num_top: int | None, param: str) -> None:
    """InputError if these are too many for one answer."""
    num_scores = 0 if num_top is None else sum(map(len, prompts)) * (1 + num_top)
    if num_scores > MAX_SCORES:
        message = f"{param} asks for {num_scores} numbers, the limit of a request is {MAX_SCORES}"
        raise InputError(message, param=param)
