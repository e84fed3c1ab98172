"""All answers to one request, side by side: those to its first prompt, then those to the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing

from qwen3vl_disagg.cluster.backend import Event, FinishedEvent, RequestHandle
from qwen3vl_disagg.core.errors import Failure
from qwen3vl_disagg.processing import Parts
from qwen3vl_disagg.serving.answer import Answer
from qwen3vl_disagg.serving.errors import JSONResponse
from qwen3vl_disagg.serving.intake import GRACE_S, Arrived, Intake
from qwen3vl_disagg.serving.watching import LEFT_CODE, RequestWatch

SMALL_TOKENS = 2**14
"""The text of so many is joined and encoded in a few milliseconds."""


class Answers:
    """`start` it, take its `events`, and `cancel` it in the end."""

    def __init__(
        self,
        handles: Sequence[RequestHandle],
        answers: list[Answer],
        watch: RequestWatch,
        deadline: float,
        silence_s: float,
    ) -> None:
        self.all, self._handles, self._watch = answers, handles, watch
        self.last = answers[0]
        """The one that ended last."""
        self._deadline, self._silence_s = deadline + GRACE_S, silence_s

    @classmethod
    async def start(
        cls, intake: Intake, arrived: Arrived, *, with_tools: bool = False, is_plain: bool = False
    ) -> Answers:
        """What the backend refuses is raised."""
        processor, answers = intake.processor, list[Answer]()
        prompts = arrived.prepared.prompts
        handles = await intake.submit(prompts, arrived.deadline, arrived.target_s, arrived.keep_as)
        arrived.watch.begun(handles)
        for prompt, sampling in arrived.prepared.prompts:
            first: Answer | None = None
            for _ in range(sampling.n):
                answer = Answer(
                    processor.tokenizer,
                    processor.generation.eos_token_ids,
                    sampling,
                    prompt.token_ids,
                    watch=arrived.watch.answer(len(prompt.token_ids), is_first=first is None),
                    with_tools=with_tools,
                    is_plain=is_plain,
                    first=first,
                )
                answers.append(answer)
                first = first or answer
        return cls(handles, answers, arrived.watch, arrived.deadline, intake.limits.ping_s)

    @property
    def request_id(self) -> str:
        return self._handles[0].request_id

    async def response(self, make: Callable[[], object], *, tells_more: bool) -> JSONResponse:
        """What `make` makes of them; beside the event loop where they are long, or it `tells_more` than their text."""
        if tells_more or sum(len(answer.token_ids) for answer in self.all) > SMALL_TOKENS:
            return await JSONResponse.aside(make)
        return JSONResponse(make())

    def cancel(self) -> None:
        """Nobody wants what has not come yet."""
        for handle in self._handles:
            handle.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Event | None, Parts]]:
        """Those of all answers as they come, each with its answer's number, as `Answer.events`. The first answer that
        fails ends all."""
        pairs = zip(self.all, self._handles, strict=True)
        streams = [a.events(handle, deadline=self._deadline, silence_s=self._silence_s) for a, handle in pairs]
        code = LEFT_CODE
        try:
            async with AsyncExitStack() as stack:
                sources = [await stack.enter_async_context(aclosing(stream)) for stream in streams]
                if len(sources) == 1:
                    async for event, new in sources[0]:
                        yield 0, event, new
                    return
                async for number, event, new in await stack.enter_async_context(aclosing(_merged(sources))):
                    if isinstance(event, FinishedEvent):
                        self.last = self.all[number]
                    yield number, event, new
        except Exception as error:
            code = Failure.of(error).code
            raise
        finally:
            self._watch.close(code)


async def _merged(
    sources: Sequence[AsyncGenerator[tuple[Event | None, Parts]]],
) -> AsyncGenerator[tuple[int, Event | None, Parts]]:
    waiting = {asyncio.ensure_future(anext(source, None)): number for number, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                found = task.result()
                number = waiting.pop(task)
                if found is not None:
                    waiting[asyncio.ensure_future(anext(sources[number], None))] = number
                    yield number, *found
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)  # several may have failed, with one error told
