"""A body -> a checked request and its prompts, whatever its route. Where that is done: `preparation.py`."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
from msgspec import structs

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.serving.chat_request import ChatRequest, check_model, parse_chat_request
from qwen3vl_disagg.serving.completion_request import (
    MAX_PROMPTS,
    CompletionRequest,
    DetokenizeBody,
    DetokenizeRequest,
    TokenizeRequest,
    chat_part,
    convert,
    parse_completion,
    parse_tokenize,
    read_prompts,
)
from qwen3vl_disagg.serving.json_body import parse_json
from qwen3vl_disagg.serving.messages_request import MessagesRequest, parse_messages_request
from qwen3vl_disagg.serving.pooling_request import (
    PooledInputs,
    PoolingRequest,
    PoolRoute,
    parse_pooling,
    pooled_prompts,
)
from qwen3vl_disagg.serving.prompt_scores import check_num_scores
from qwen3vl_disagg.serving.response_request import ResponseRequest, parse_response

BodyRoute = Literal["chat", "completion", "response", "messages", "count", "tokenize", "detokenize"] | PoolRoute
_Answered = ChatRequest | CompletionRequest | ResponseRequest | MessagesRequest
Request = _Answered | PoolingRequest | TokenizeRequest | DetokenizeRequest


@dataclass(frozen=True)
class Prepared:
    """A checked request. `seconds` of work went into it."""

    request: Request
    prompts: list[tuple[Prompt, SamplingParams]]
    seconds: float

    @property
    def prompt(self) -> Prompt:
        """The first, of most requests the only one."""
        return self.prompts[0][0]

    @property
    def sampling(self) -> SamplingParams:
        return self.prompts[0][1]

    def salted(self, salt: str) -> Prepared:
        """The same request, which shares what is cached with those of the same `salt`, and the same of its own, alone;
        as it is where there is none."""
        if not salt:
            return self
        both = hashlib.sha256(f"{salt} {self.sampling.cache_salt}".encode()).hexdigest()
        made, last = [], self.sampling
        salted = structs.replace(last, cache_salt=both)
        for prompt, sampling in self.prompts:
            if sampling != last:  # what is checked takes its time; of thousands of inputs all are equal
                last, salted = sampling, structs.replace(sampling, cache_salt=both)
            items = [structs.replace(item, salt=both) for item in prompt.items]
            made.append((replace(prompt, items=items), salted))
        return replace(self, prompts=made)


@dataclass(frozen=True)
class Parsed:
    """A request whose messages or prompts, in `raw`, have not been looked at. `chat`: how messages become a prompt.
    `pooled`: messages of many prompts, in place of `raw`."""

    raw: dict[str, Any]
    tools: list[dict[str, Any]]
    request: Request
    chat: ChatRequest | None
    seconds: float
    pooled: PooledInputs | None = None

    @property
    def messages(self) -> Any:
        """In which media may stand."""
        if self.pooled is not None:
            return self.pooled.messages
        return [] if self.chat is None else self.raw["messages"]

    def clear(self) -> None:
        self.raw.clear()
        if self.pooled is not None:
            self.pooled.clear()


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the server, not the request, says about prompts and answers."""

    model_names: list[str]
    """The first one stands in answers."""
    max_answer_tokens: int | None = None
    """Bound of an answer whose request names none. None: what is left of the context."""


def read_request(body: bytes | bytearray, rules: Rules, route: BodyRoute = "chat") -> Parsed:
    """InputError for what is no request of the route."""
    started, tools = time.monotonic(), list[dict[str, Any]]()
    raw, names = parse_json(body), rules.model_names
    request: Request
    chat = pooled = None
    match route:
        case "chat":
            chat, tools = parse_chat_request(raw, model_names=names)
            request = chat
        case "completion":
            request = parse_completion(raw, model_names=names)
        case "response":
            request, chat, tools, raw = parse_response(raw, model_names=names)
        case "messages" | "count":
            is_count = route == "count"
            request, chat, tools, raw = parse_messages_request(raw, model_names=names, is_count=is_count)
        case "tokenize":
            request = parse_tokenize(raw, model_names=names)
            if raw.get("messages") is not None:
                chat, tools = parse_chat_request(chat_part(raw), model_names=names)
        case "detokenize":
            check_model(convert(raw, DetokenizeBody).model, names)
            request = DetokenizeRequest()
        case "embeddings" | "rerank" | "score":
            request, pooled = parse_pooling(raw, route, model_names=names)
            raw = {}
    return Parsed(raw, tools, request, chat, time.monotonic() - started, pooled)


def finish_request(parsed: Parsed, processor: Processor, rules: Rules, stop: StopSignal) -> Prepared:
    """InputError for bad messages or prompts; Stopped once `stop` is set."""
    started, request = time.monotonic(), parsed.chat
    if request is None:
        made = _of_prompts(parsed, processor, stop)
        return replace(made, seconds=parsed.seconds + time.monotonic() - started)
    prompt = processor.prepare(parsed.raw["messages"], tools=parsed.tools, options=request.prompt, stop=stop)
    sampling = request.sampling.params(
        processor,
        num_prompt=len(prompt.token_ids),
        cache_salt=request.prompt.cache_salt,
        grammar=request.grammar,
        max_answer_tokens=rules.max_answer_tokens,
        told_by_token=isinstance(parsed.request, ChatRequest) and parsed.request.stream,
    )
    check_num_scores([prompt.token_ids], sampling.prompt_logprobs, "prompt_logprobs")
    return Prepared(parsed.request, [(prompt, sampling)], parsed.seconds + time.monotonic() - started)


def _of_prompts(parsed: Parsed, processor: Processor, stop: StopSignal) -> Prepared:
    """Of texts and token ids, and of many conversations."""
    request, size = parsed.request, processor.config.text.vocab_size
    if isinstance(request, CompletionRequest):
        n = request.sampling.values.get("n", 1)
        times = n if request.echo or request.return_token_ids else 1
        prompts = read_prompts(parsed.raw["prompt"], processor, times=times)
        if len(prompts) * n > MAX_PROMPTS:
            reason = f"{len(prompts)} prompts and n: {n} are more answers than a request may have, {MAX_PROMPTS}"
            raise InputError(reason, param="n")
        told = [prompt.token_ids for prompt in prompts] * (n if request.echo else 1)
        check_num_scores(told, request.num_scores, "logprobs")
        fields = request.sampling.told_by_ids(processor)
        sampled = [
            fields.params(
                processor,
                num_prompt=len(prompt.token_ids),
                num_prompts=len(prompts),
                cache_salt=request.cache_salt,
                grammar=request.grammar,
                told_by_token=request.stream,
            )
            for prompt in prompts
        ]
        return Prepared(request, list(zip(prompts, sampled, strict=True)), 0.0)
    if isinstance(request, PoolingRequest) and parsed.pooled is not None:
        return Prepared(request, list(pooled_prompts(request, parsed.pooled, processor, stop)), 0.0)
    if isinstance(request, DetokenizeRequest):
        tokens = convert(parsed.raw, DetokenizeBody).tokens
        if max(tokens, default=0) >= size:
            raise InputError(f"tokens must be from 0 to {size - 1}", param="tokens")
        return Prepared(request, [(Prompt(tokens, [], []), SamplingParams())], 0.0)
    token_ids = processor.text_ids(parsed.raw["prompt"], "prompt")
    return Prepared(request, [(Prompt(token_ids, [], []), SamplingParams())], 0.0)
