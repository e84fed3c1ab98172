"""Body -> prompt: the work itself, the same in this process and in a child, and what a child and its parent say."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from qwen3vl_disagg.core.failure import Failure
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.media.stop import Stop
from qwen3vl_disagg.media.video import VideoInfo
from qwen3vl_disagg.media.wire import Ready
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.serving.body import parse_json
from qwen3vl_disagg.serving.chat_request import ChatRequest, parse_chat_request


@dataclass(frozen=True)
class Prepared:
    """A checked request. `seconds` of work went into it."""

    request: ChatRequest
    prompt: Prompt
    sampling: SamplingParams
    seconds: float


@dataclass(frozen=True)
class Parsed:
    """A request whose messages, in `raw`, have not been looked at."""

    raw: dict[str, Any]
    tools: list[dict[str, Any]]
    request: ChatRequest
    seconds: float


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the server, not the request, says about prompts and answers."""

    model_name: str
    max_answer_tokens: int | None = None
    """Bound of an answer whose request names none. None: what is left of the context."""


def read_request(body: bytes | bytearray, rules: Rules) -> Parsed:
    """InputError for what is no chat request."""
    started = time.monotonic()
    raw = parse_json(body)
    request, tools = parse_chat_request(raw, model_name=rules.model_name)
    return Parsed(raw, tools, request, time.monotonic() - started)


def finish_request(parsed: Parsed, processor: Processor, rules: Rules, stop: Stop) -> Prepared:
    """InputError for bad messages; Stopped once `stop` is set."""
    started, request = time.monotonic(), parsed.request
    prompt = processor.prepare(parsed.raw["messages"], tools=parsed.tools, options=request.prompt, stop=stop)
    text = processor.config.text
    sampling = request.sampling(
        processor.generation,
        num_prompt=len(prompt.token_ids),
        context=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        max_answer_tokens=rules.max_answer_tokens,
    )
    return Prepared(request, prompt, sampling, parsed.seconds + time.monotonic() - started)


# ---- between a preparing child and its parent ----


class ChildSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is started with."""

    folder: str
    video_outer_wrapper: bool
    rules: Rules


class BodyJob(msgspec.Struct, frozen=True):
    """Followed by a body of `num_bytes`."""

    num_bytes: int


class ProbeWanted(msgspec.Struct, frozen=True, tag="probe"):
    """Followed by a clip of `num_bytes`: only the parent has decoders. It answers with `Probed`."""

    num_bytes: int


class Probed(msgspec.Struct, frozen=True):
    info: VideoInfo | None = None
    failure: Failure | None = None


class Made(msgspec.Struct, frozen=True, tag="made"):
    """Followed by as many bytes: a `MadeRequest`, the prompt's token ids as int32, and the bytes of each item."""

    sizes: list[int]


class MadeRequest(msgspec.Struct, frozen=True):
    request: ChatRequest
    sampling: SamplingParams
    items: list[VisualItem]


class NotMade(msgspec.Struct, frozen=True, tag="not made"):
    failure: Failure


ChildReply = Ready | ProbeWanted | Made | NotMade
