"""What a request's body says of sampling, on any route: read by the table of options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.sampling_params import MAX_NEW_TOKENS, OPTIONS, Route, SamplingParams
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.processing.bad_words import with_ids, word_ids
from qwen3vl_disagg.processing.request_fields import is_one_of, read_flag

MAX_LOGPROBS = 2**20
"""Of one request: of each token of its answers its own, and the alternatives. 90 MB of text, if told together."""


class SamplingFields(msgspec.Struct, frozen=True):
    """Option -> its value, and -> the spelling it came in, of those that are given."""

    values: dict[str, Any]
    spelled: dict[str, str]

    @classmethod
    def read(cls, raw: Mapping[str, Any], route: Route) -> SamplingFields:
        """InputError with `param`."""
        values, spelled = dict[str, Any](), dict[str, str]()
        for name, option in OPTIONS.items():
            for spelling in option.spellings(name, route):
                value = raw.get(spelling)
                if value is None or is_one_of(value, option.not_set):
                    continue
                value = option.kind(option.means(value) if option.means else value, spelling)
                if name not in values:
                    values[name], spelled[name] = value, spelling
            if (switch := option.switch.get(route)) is None:
                continue
            if raw.get(switch) is not None and read_flag(raw[switch], switch):
                values.setdefault(name, 0)
            elif values.pop(name, 0):
                raise InputError(f"{spelled[name]} needs {switch}: true", param=spelled[name])
        return cls(values, spelled)

    @property
    def wants_logprobs(self) -> bool:
        return "logprobs" in self.values

    def told_by_ids(self, processor: Processor) -> SamplingFields:
        """The same with ids for bad words: once for all prompts of a request."""
        if not (words := self.values.get("bad_words")):
            return self
        return SamplingFields(self.values | {"bad_words": word_ids(words, processor.tokenizer)}, self.spelled)

    def params(
        self,
        processor: Processor,
        *,
        num_prompt: int,
        num_prompts: int = 1,
        cache_salt: str = "",
        grammar: Grammar | None = None,
        max_answer_tokens: int | None = None,
        told_by_token: bool = False,
    ) -> SamplingParams:
        """What the engine needs. InputError if the prompt and the tokens asked for do not fit the context, or all
        answers of the request would have more than MAX_LOGPROBS log probabilities.

        `num_prompts`: of the request. `max_answer_tokens`: bound of an answer whose request names none.
        `told_by_token`: log probabilities are told with their token, and not kept; there may be any number of them.
        """
        context, vocab_size = processor.max_model_len, processor.config.text.vocab_size
        room, asked = context - num_prompt, self.values.get("max_new_tokens")
        if asked is not None and asked > room:
            raise InputError(
                f"a prompt of {num_prompt} tokens and {asked} new ones: the context is {context}",
                param=self.spelled["max_new_tokens"],
                code="context_length_exceeded",
            )
        for name, value in self.values.items():
            if max(OPTIONS[name].kind.tokens(value), default=0) >= vocab_size:
                raise InputError(f"{name} takes token ids from 0 to {vocab_size - 1}", param=self.spelled[name])
        bound = min(room, max_answer_tokens or room, MAX_NEW_TOKENS)
        if self.wants_logprobs and not told_by_token:
            num_each = num_prompts * self.values.get("n", 1) * (1 + self.values["logprobs"])
            if (asked or 0) * num_each > MAX_LOGPROBS:
                name = self.spelled.get("logprobs", "logprobs")
                reason = f"{name} asks for up to {asked * num_each} log probabilities, all answers and alternatives"
                raise InputError(f"{reason} together: a request may have {MAX_LOGPROBS}", param=name)
            bound = min(bound, MAX_LOGPROBS // num_each)
        length = {"max_new_tokens": bound, "is_open_ended": True} if asked is None else {}
        sampling = processor.generation.sampling(cache_salt=cache_salt, grammar=grammar, **self.values | length)
        return with_ids(sampling, processor.tokenizer)
