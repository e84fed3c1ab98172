"""`POST /tokenize` and `POST /detokenize`, in vLLM's form."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.serving.completion_request import TokenizeRequest
from qwen3vl_disagg.serving.errors import JSONResponse
from qwen3vl_disagg.serving.intake import Arrived, Intake
from qwen3vl_disagg.serving.types import DetokenizedText, TokenizedText


class Tokenize:
    """Token ids of a text, or of the prompt that a chat request would make: with all placeholders of its media."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(arrived: Arrived) -> None:
            request, token_ids = arrived.prepared.request, arrived.prepared.prompt.token_ids
            if not isinstance(request, TokenizeRequest):
                raise TypeError(f"{type(request).__name__} on this route")
            processor = self._intake.processor
            told = TokenizedText(count=len(token_ids), max_model_len=processor.max_model_len, tokens=token_ids)
            if request.with_strings:
                name = processor.tokenizer.backend.id_to_token
                told.token_strs = await asyncio.to_thread(lambda: [name(i) or "" for i in token_ids])
            await JSONResponse(told)(scope, receive, send)

        await self._intake.run("tokenize", scope, receive, answer)


class Detokenize:
    """The text of token ids, special ones included."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(arrived: Arrived) -> None:
            token_bytes = self._intake.processor.tokenizer.token_bytes
            token_ids = arrived.prepared.prompt.token_ids
            raw = await asyncio.to_thread(lambda: b"".join(map(token_bytes, token_ids)))
            await JSONResponse(DetokenizedText(prompt=raw.decode("utf-8", "replace")))(scope, receive, send)

        await self._intake.run("detokenize", scope, receive, answer)
