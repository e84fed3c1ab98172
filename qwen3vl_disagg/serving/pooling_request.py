"""Requests for vectors and scores: `/v1/embeddings`, `/v1/rerank` and `/v1/score`, checked.

What becomes prompts is, until media by URL have been fetched, one list of messages, each prompt's behind those of the
one before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from typing import Any, Literal, get_args

import msgspec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.readers import Flag, Number, OneOf
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import Task
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.messages import Placed, put_decoded
from qwen3vl_disagg.processing.pooling import (
    Conversation,
    embed_messages,
    pair_messages,
    parts_of,
    sized,
    with_instruction,
)
from qwen3vl_disagg.processing.prompt_options import PromptOptions
from qwen3vl_disagg.processing.request_fields import check_fields
from qwen3vl_disagg.serving.chat_request import check_model
from qwen3vl_disagg.serving.completion_request import check_prompt_tokens, read_ids

PoolRoute = Literal["embeddings", "rerank", "score"]
POOL_ROUTES: tuple[PoolRoute, ...] = get_args(PoolRoute)
TASKS: dict[str, Task] = {"embeddings": "embed", "rerank": "rerank", "score": "rerank"}
MAX_INPUTS = 2048
"""Of one request, as OpenAI's."""
MAX_NUMBERS, MAX_BASE64_NUMBERS = 2**21, 2**23
"""Of an answer that spells them out, and of one that does not: 40 MB of text."""
MAX_PARTS = 2**16
"""Of all prompts of a request; those of a query count once for each of its documents."""
MAX_ITEMS = 4096
"""Images and clips of one request, each as often as it comes."""
_DIMENSIONS, _TOP_N = Number(1, 2**24, is_whole=True), Number(0, 2**31, is_whole=True)
_FORMAT, _FLAG = OneOf(("float", "base64")), Flag()
_QUERIES = ("queries", "text_1", "data_1")
_DOCUMENTS = ("documents", "items", "text_2", "data_2")


class PoolingRequest(msgspec.Struct, frozen=True, kw_only=True, tag="pooling"):
    route: PoolRoute
    prompt: PromptOptions
    dimensions: int | None = None
    is_base64: bool = False
    top_n: int = 0
    """So many of the best documents; 0: all."""
    texts: list[str | None] | None = None
    """Of the documents, which stand in the answer; of one that is no text alone None."""
    has_one_query: bool = False


class PooledInputs(msgspec.Struct, frozen=True):
    """What becomes prompts: token ids, or messages, `sizes[n]` of them for prompt n."""

    messages: list[Any]
    sizes: list[int]
    ids: list[Any]
    places: Sequence[str]

    @classmethod
    def of(cls, conversations: Sequence[Conversation], places: Sequence[str]) -> PooledInputs:
        return cls([turn for one in conversations for turn in one], list(map(len, conversations)), [], places)

    def clear(self) -> None:
        self.messages.clear()
        self.ids.clear()


def parse_pooling(
    raw: Mapping[str, Any], route: PoolRoute, *, model_names: Collection[str]
) -> tuple[PoolingRequest, PooledInputs]:
    """InputError with `param`; 404 for another model's name. What stands in messages is looked at later."""
    check_model(raw.get("model"), model_names)
    check_fields(raw, route)
    said = {name: value for name, value in raw.items() if value is not None}
    instruction = said.get("instruction")
    options = PromptOptions.read(raw)
    if route == "embeddings":
        request = PoolingRequest(
            route=route,
            prompt=options,
            dimensions=_DIMENSIONS(said["dimensions"], "dimensions") if "dimensions" in said else None,
            is_base64=_FORMAT(said.get("encoding_format", "float"), "encoding_format") == "base64",
        )
        return request, _embedded(said, instruction)
    many = route == "score"
    queries, query_places = _several(said, _QUERIES if many else ("query",), is_one=not many)
    documents, places = _several(said, _DOCUMENTS if many else ("documents",))
    if len(queries) not in (1, len(documents)):
        reason = f"{len(queries)} queries and {len(documents)} documents: there must be one query, or as many"
        raise InputError(reason, param=query_places[0].partition("[")[0])
    asked = list(map(parts_of, queries, query_places))
    asked *= len(documents) if len(asked) == 1 else 1
    answers = list(map(parts_of, documents, places))
    _check_parts((*asked, *answers), places[0].partition("[")[0])
    has_texts = not many and _FLAG(said.get("return_documents", True), "return_documents")
    request = PoolingRequest(
        route=route,
        prompt=options,
        top_n=_TOP_N(said.get("top_n", 0), "top_n"),
        texts=[one if isinstance(one, str) else None for one in documents] if has_texts else None,
        has_one_query=len(queries) == 1,
    )
    made = zip(asked, answers, places, strict=True)
    pairs = [pair_messages(query, one, instruction, where) for query, one, where in made]
    return request, PooledInputs.of(pairs, places)


def _embedded(said: Mapping[str, Any], instruction: object) -> PooledInputs:
    given, messages = said.get("input"), said.get("messages")
    if (given is None) == (messages is None):
        raise InputError("there must be either an input or messages", param="input")
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise InputError("messages must be a list with at least one message", param="messages")
        return PooledInputs.of([with_instruction(messages, instruction)], ["messages"])
    is_ids = isinstance(given, list) and bool(given) and isinstance(given[0], (int, float))
    inputs = [given] if is_ids or not isinstance(given, list) else given
    _check_count(inputs, "input")
    places = [f"input[{n}]" if inputs is given else "input" for n in range(len(inputs))]
    if isinstance(inputs[0], list):
        return PooledInputs([], [], list(inputs), places)
    made = [embed_messages(one, instruction, where) for one, where in zip(inputs, places, strict=True)]
    _check_parts([turn["content"] for one in made for turn in one], "input")
    return PooledInputs.of(made, places)


def _several(said: Mapping[str, Any], names: Sequence[str], *, is_one: bool = False) -> tuple[list[Any], list[str]]:
    """What is given under one of these names, and the place of each. Parts of an object's `content` are one each, as
    vLLM has it, but of a single query."""
    given = [name for name in names if name in said]
    if len(given) != 1:
        reason = f"{given[0]} and {given[1]} are two names of the same" if given else f"{names[0]} is missing"
        raise InputError(reason, param=given[1] if given else names[0])
    [name] = given
    value = said[name]
    if is_one or isinstance(value, str):
        return [value], [name]
    if isinstance(value, Mapping):
        if not isinstance(parts := value.get("content"), list):
            return [value], [name]
        _check_count(parts, f"{name}.content")
        places = [f"{name}.content[{n}]" for n in range(len(parts))]
        pairs = zip(places, parts, strict=True)
        return [Placed(where, part) if isinstance(part, Mapping) else part for where, part in pairs], places
    _check_count(value, name)
    return list(value), [f"{name}[{n}]" for n in range(len(value))]


def _check_count(values: object, param: str) -> None:
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_INPUTS:
        raise InputError(f"{param} must be one, or a list of 1 to {MAX_INPUTS}", param=param)


def _check_parts(of_inputs: Iterable[Sized], param: str) -> None:
    if (count := sum(map(len, of_inputs))) > MAX_PARTS:
        raise InputError(f"the prompts have {count} parts, those of a request may have {MAX_PARTS}", param=param)


def pooled_prompts(
    request: PoolingRequest, inputs: PooledInputs, processor: Processor, stop: StopSignal
) -> list[tuple[Prompt, SamplingParams]]:
    """InputError naming the place of what cannot be a prompt; Stopped once `stop` is set."""
    options = sized(request.prompt)
    sampling = processor.pooling(request.dimensions, cache_salt=options.cache_salt)
    num_inputs = len(inputs.sizes) or len(inputs.ids)
    width = request.dimensions or processor.config.text.hidden_size
    most, hint = (MAX_BASE64_NUMBERS, "") if request.is_base64 else (MAX_NUMBERS, "base64, or ")
    if request.route == "embeddings" and num_inputs * width > most:
        reason = f"{num_inputs} vectors of {width} numbers are more than {most}: ask for {hint}fewer"
        raise InputError(reason, param="encoding_format" if hint else "input")
    planner = processor.planner(options, stop)
    put_decoded(inputs.messages)
    prompts, start, num_tokens, num_items = list[Prompt](), 0, 0, 0
    for number in range(num_inputs):
        stop.check()
        where = inputs.places[number]
        if inputs.ids:
            prompts.append(Prompt(read_ids(inputs.ids[number], processor, where), [], []))
            if not prompts[-1].token_ids:
                raise InputError(f"{where} is empty", param=where)
        else:
            turns = inputs.messages[start : start + inputs.sizes[number]]
            start += len(turns)
            try:
                prompts.append(processor.prepare(turns, options=options, planner=planner))
            except InputError as error:
                error.param = where if error.param == "messages" else error.param
                raise
        num_tokens += len(prompts[-1].token_ids)
        num_items += len(prompts[-1].items)
        check_prompt_tokens(num_tokens, where, is_first=not number)
        if num_items > MAX_ITEMS:
            raise InputError(f"more than {MAX_ITEMS} images and videos", param=prompts[-1].items[-1].param)
    return [(prompt, sampling) for prompt in prompts]
