"""Body -> prompt: the work itself, and a child that does it for large requests.

The child gets bodies from standard input and writes prompts to standard output. It may take all its time: no other
request, no heartbeat and no client waits for the lock that it holds while a library works through megabytes of text.
It is killed when its request has ended, and with its parent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import structs

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.cluster.slots import die_with_parent
from qwen3vl_disagg.core.errors import DisaggError, Failure, PreparationFailed
from qwen3vl_disagg.core.logs import start_logging
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.media import sandbox
from qwen3vl_disagg.media.child import LENGTH_BYTES, Ready, body_length, is_wanted, pack, read_exactly, write_all
from qwen3vl_disagg.media.decoder import MediaDecoder
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.media.video import VideoInfo
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.serving.body import parse_json
from qwen3vl_disagg.serving.chat_request import ChatRequest, parse_chat_request
from qwen3vl_disagg.serving.limits import MAX_BODY_BYTES

logger = logging.getLogger(__name__)
NICENESS = 10
"""Ranks that decode on the same cores go first."""
MAX_MEMORY = 3 * 2**29
"""On top of what it has when it is ready: 64 MiB of base64 beside an emoji, or 8 Mi characters of one word."""


@dataclass(frozen=True)
class Prepared:
    """A checked request. `seconds` of work went into it."""

    request: ChatRequest
    prompt: Prompt
    sampling: SamplingParams
    seconds: float

    def salted(self, salt: str) -> Prepared:
        """The same request, which shares what is cached with those of the same `salt`, and the same of its own, alone;
        as it is where there is none."""
        if not salt:
            return self
        both = hashlib.sha256(f"{salt} {self.sampling.cache_salt}".encode()).hexdigest()
        items = [structs.replace(item, salt=both) for item in self.prompt.items]
        sampling = structs.replace(self.sampling, cache_salt=both)
        return replace(self, prompt=replace(self.prompt, items=items), sampling=sampling)


@dataclass(frozen=True)
class Parsed:
    """A request whose messages, in `raw`, have not been looked at."""

    raw: dict[str, Any]
    tools: list[dict[str, Any]]
    request: ChatRequest
    seconds: float


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the server, not the request, says about prompts and answers."""

    model_names: list[str]
    """The first one stands in answers."""
    max_answer_tokens: int | None = None
    """Bound of an answer whose request names none. None: what is left of the context."""


def read_request(body: bytes | bytearray, rules: Rules) -> Parsed:
    """InputError for what is no chat request."""
    started = time.monotonic()
    raw = parse_json(body)
    request, tools = parse_chat_request(raw, model_names=rules.model_names)
    return Parsed(raw, tools, request, time.monotonic() - started)


def finish_request(parsed: Parsed, processor: Processor, rules: Rules, stop: StopSignal) -> Prepared:
    """InputError for bad messages; Stopped once `stop` is set."""
    started, request = time.monotonic(), parsed.request
    prompt = processor.prepare(parsed.raw["messages"], tools=parsed.tools, options=request.prompt, stop=stop)
    text = processor.config.text
    sampling = request.sampling.params(
        processor.generation,
        num_prompt=len(prompt.token_ids),
        context=processor.max_model_len,
        vocab_size=text.vocab_size,
        cache_salt=request.prompt.cache_salt,
        max_answer_tokens=rules.max_answer_tokens,
    )
    return Prepared(request, prompt, sampling, parsed.seconds + time.monotonic() - started)


# ---- between a preparing child and its parent ----


class ChildSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is started with."""

    folder: str
    video_outer_wrapper: bool
    max_model_len: int
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
    """Followed by as many bytes: a `MadeHead`, the prompt's token ids as int32, and the bytes of each item."""

    sizes: list[int]


MadeHead = tuple[ChatRequest, SamplingParams, list[VisualItem]]


class NotMade(msgspec.Struct, frozen=True, tag="not made"):
    failure: Failure


ChildReply = Ready | ProbeWanted | Made | NotMade


class ParentsDecoder(MediaDecoder):
    """Asks the parent what a clip's file holds."""

    def __init__(self, out: int, parent: int) -> None:
        super().__init__()
        self._out, self._parent = out, parent

    def probe_video(self, data: bytes, *, stop: StopSignal | None = None) -> VideoInfo:
        write_all(self._out, pack(ProbeWanted(len(data))), self._parent)
        write_all(self._out, data, self._parent)
        probed = msgspec.msgpack.decode(_read_message(self._parent), type=Probed)
        if probed.failure is not None:
            raise probed.failure.error()
        if probed.info is None:
            raise EOFError
        return probed.info


def _read_message(parent: int) -> bytearray:
    """EOFError when the parent has closed or is gone."""
    if not is_wanted(parent, read=[0]):
        raise EOFError
    return read_exactly(0, body_length(read_exactly(0, LENGTH_BYTES)))


def reply(prepared: Prepared) -> list[bytes]:
    """A header and what follows it."""
    prompt = prepared.prompt
    parts = [
        msgspec.msgpack.encode((prepared.request, prepared.sampling, prompt.items)),
        np.asarray(prompt.token_ids, dtype="<i4").tobytes(),
        *prompt.media,
    ]
    return [pack(Made([len(part) for part in parts])), *parts]


def answer(body: bytearray, processor: Processor, setup: ChildSetup) -> list[bytes]:
    """What `reply` makes of a good request, or why there is none."""
    try:
        parsed = read_request(body, setup.rules)
        body.clear()
        return reply(finish_request(parsed, processor, setup.rules, StopSignal()))
    except DisaggError as error:
        return [pack(NotMade(Failure.of(error)))]
    except (EOFError, BrokenPipeError):
        raise
    except Exception:
        logger.exception("a request could not be prepared")
        return [pack(NotMade(Failure.of(PreparationFailed())))]


def main() -> None:
    start_logging("prompts")
    parent = os.getppid()
    die_with_parent(parent)
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    os.set_blocking(out, False)
    setup = msgspec.json.decode(sys.argv[1], type=ChildSetup)
    folder = Path(setup.folder)
    processor = Processor.from_folder(
        folder,
        read_config(folder),
        decoder=ParentsDecoder(out, parent),
        video_outer_wrapper=setup.video_outer_wrapper,
        max_model_len=setup.max_model_len,
    )
    processor.tokenizer.num_tokens_at_least("ready")  # tables that are made on first use
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    sandbox.enter(pages * os.sysconf("SC_PAGE_SIZE") + MAX_MEMORY)
    os.nice(NICENESS)
    try:
        write_all(out, pack(Ready()), parent)
        while True:
            job = msgspec.msgpack.decode(_read_message(parent), type=BodyJob)
            if not 0 <= job.num_bytes <= MAX_BODY_BYTES:
                return
            for part in answer(read_exactly(0, job.num_bytes), processor, setup):
                write_all(out, part, parent)
    except (EOFError, BrokenPipeError):
        return  # the parent closed


if __name__ == "__main__":
    main()
