"""A backend that plays a script in place of ranks, and a real processor over the small checkpoint."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.cluster.backend import AllDecoded, Event, FinishedEvent, PromptCall, Readiness, TokenEvent
from qwen3vl_disagg.cluster.loads import Load
from qwen3vl_disagg.cluster.media_store import MediaStore
from qwen3vl_disagg.cluster.registry import RankKey
from qwen3vl_disagg.cluster.traces import Watched
from qwen3vl_disagg.core.errors import DisaggError, UnavailableError
from qwen3vl_disagg.core.pooling import Pooling
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings, SamplingParams, TokenLogprob
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.protocol.messages import PromptLogprobs
from qwen3vl_disagg.serving.app import create_app

PATH = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "what is it?"}]}

Step = Event | Exception | float
"""An event, an error to raise, or seconds to wait."""


@functools.cache
def tiny_processor() -> Processor:
    folder = resolve_model_folder(None)
    return Processor.from_folder(folder, read_config(folder))


@dataclass
class FakeHandle:
    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    timeout_s: float
    steps: list[Step]
    target_s: float
    was_cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    num_sent: int = 0
    finished: bool = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        for step in self.steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, (int, float)):
                await asyncio.sleep(step)
                continue
            self.num_sent += 1
            self.finished = isinstance(step, FinishedEvent)
            yield step

    def cancel(self) -> None:
        self.was_cancelled.set()


class FakeBackend:
    """`script`: what a request's steps are. `handles`: all requests so far."""

    def __init__(self, script: Callable[[Prompt, SamplingParams], list[Step]] | None = None) -> None:
        self.script = script or self._answer
        self.state = Readiness(ready=True)
        self.refused: DisaggError | None = None
        """Why everything is refused."""
        self.handles: list[FakeHandle] = []
        self.loads: dict[RankKey, Load | None] = {}
        self.watched, self.asked_after = Watched(now=100.0), list[int]()
        self.media = MediaStore()

    def _answer(self, prompt: Prompt, sampling: SamplingParams) -> list[Step]:
        if sampling.pooling is None:
            return answer_steps("red circle", sampling)
        return vector_steps(len(self.handles), sampling.pooling)

    def readiness(self) -> Readiness:
        return self.state

    def refusal(self, num_coming: int = 0) -> DisaggError | None:
        if self.refused is None and not self.state.ready:
            return UnavailableError("the server is not ready: " + "; ".join(self.state.reasons))
        return self.refused

    def submit(self, prompts: Sequence[PromptCall], timeout_s: float) -> list[FakeHandle]:
        num_before = len(self.handles)
        for call in prompts:
            token_ids = np.frombuffer(call.token_ids, "<i4").tolist()
            prompt = Prompt(token_ids, call.items, [self.media.get(item.digest) or b"" for item in call.items])
            self.media.release(call.items)
            for sample in range(call.sampling.n):
                steps = self.script(prompt, call.sampling)
                if steps and isinstance(steps[0], Exception):
                    del self.handles[num_before:]  # none of them, then
                    raise steps[0]
                num_scores = None if sample else call.sampling.prompt_logprobs
                if num_scores is not None and steps and isinstance(steps[0], AllDecoded):
                    steps.insert(1, prompt_logprobs(prompt, num_scores))
                name = f"r{len(self.handles)}"
                self.handles.append(FakeHandle(name, prompt, call.sampling, timeout_s, steps, call.target_s))
        return self.handles[num_before:]

    def rank_loads(self) -> dict[RankKey, Load | None]:
        return self.loads

    async def spans(self, after: int = 0) -> Watched:
        self.asked_after.append(after)
        return self.watched

    def debug_processes(self) -> list[dict[str, Any]]:
        return [{"pid": 1, "role": "encode", "rank": 0}]


def serve(backend: FakeBackend, *, processor: Processor | None = None, **options: Any) -> TestClient:
    """A client of the app over `backend`; `options` are create_app's."""
    app = create_app(backend, processor or tiny_processor(), model_name="tiny", **options)
    return TestClient(app, raise_server_exceptions=False)


def timings() -> RequestTimings:
    item = ItemTimings(preprocess=1, encode=2, transfer=3, transfer_bytes=4, encode_rank=0, rows=5)
    return RequestTimings(
        queue=1, preprocess=1, encode=2, transfer=3, prefill=4, decode=5, encode_ranks=[0], items=[item]
    )


def answer_steps(text: str, sampling: SamplingParams) -> list[Step]:
    """AllDecoded, the text's tokens and the end token as far as the limit goes, the end."""
    tokenizer = tiny_processor().tokenizer
    token_ids = [*tokenizer.encode(text), tokenizer.token_id("<|im_end|>")]
    return answer_of(token_ids, sampling)


def answer_of(token_ids: list[int], sampling: SamplingParams) -> list[Step]:
    cut = token_ids[: sampling.max_new_tokens]
    steps: list[Step] = [AllDecoded()]
    for token_id in cut:
        entry = None
        if sampling.logprobs is not None:
            entry = TokenLogprob(token_id, -0.5, [(token_id, -0.5), (5, float("-inf"))][: sampling.logprobs])
        steps.append(TokenEvent(token_id, entry))
    reason = "stop" if len(cut) == len(token_ids) else "length"
    return [*steps, FinishedEvent(reason, timings())]


def vector_steps(number: int, pooling: Pooling) -> list[Step]:
    """A vector number, number + 1/8, number + 2/8, .., or `number` as the difference of two logits."""
    size = 1 if pooling.tokens else pooling.dimensions or 64
    vector = (number + np.arange(size) / 8).astype("<f4").tobytes()
    return [AllDecoded(), FinishedEvent("stop", timings(), vector)]


def prompt_logprobs(prompt: Prompt, num_top: int, index: int = 1) -> PromptLogprobs:
    """Of its tokens from `index` on: token t has -t / 8 and rank t, and the tokens 1, 2, .. are the most likely."""
    numbers = np.arange(index, len(prompt.token_ids))
    top_ids = np.tile(np.arange(1, num_top + 1), len(numbers))
    return PromptLogprobs(
        request_id="",
        index=index,
        own=(numbers / -8).astype("<f4").tobytes(),
        ranks=numbers.astype("<i4").tobytes(),
        top_ids=top_ids.astype("<i4").tobytes(),
        top=(top_ids / -16).astype("<f4").tobytes(),
    )
