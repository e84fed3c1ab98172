"""`LLM`: the whole system in one process: encode worker, in-process transfer, engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from qwen3vl_disagg.checkpoint import load_language_model, load_vision_model
from qwen3vl_disagg.checkpoint.check import check_folder
from qwen3vl_disagg.checkpoint.hub import resolve_model_folder
from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.core.requests import FinishReason, RequestTimings, SamplingParams, TokenLogprob
from qwen3vl_disagg.core.settings import (
    DTYPES,
    BufferOptions,
    EncodeOptions,
    ModelOptions,
    check_supported,
    resolve_compile,
    resolve_device,
)
from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.encode_worker import EncodeWorker
from qwen3vl_disagg.disagg.local import ItemError, LocalTransfer, Outcome
from qwen3vl_disagg.disagg.messages import Finished, NeedItems, RequestFailed, Tokens
from qwen3vl_disagg.disagg.receiver import Receiver
from qwen3vl_disagg.disagg.rows import Delivery
from qwen3vl_disagg.engine.engine import Engine, EngineEvent, EngineOptions, Preempted, RowsUsed
from qwen3vl_disagg.media.decoder import MediaDecoder
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.processing import AnswerParts, AnswerReason, Parts, Processor, Prompt, ToolCall, parse_tools

TextCallback = Callable[[int, str], None]


def _emit(on_text: TextCallback | None, on_reasoning: TextCallback | None, i: int, new: Parts) -> None:
    if new.reasoning and on_reasoning is not None:
        on_reasoning(i, new.reasoning)
    if new.content and on_text is not None:
        on_text(i, new.content)


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One answer, as `generate --json` prints it. `token_ids` ends with the end token if it came; `text` has none.

    `text` is without what the model thought and the tools it called; `token_ids` and `logprobs` have all of it.
    """

    text: str
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: AnswerReason
    usage: Usage
    timings: RequestTimings
    logprobs: list[TokenLogprob] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; each logprobs entry is `{"token_id", "logprob", "top": [[id, logprob], ..]}`."""
        return msgspec.to_builtins(self)


@dataclass
class _Answer:
    """An answer under way."""

    prompt: Prompt
    parts: AnswerParts
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_timings: RequestTimings = field(default_factory=RequestTimings)
    """As they were at the first token."""
    first_token_at: float = 0.0

    def result(self, finish_reason: FinishReason, timings: RequestTimings) -> ChatResult:
        parts = self.parts
        num_prompt, num_new = len(self.prompt.token_ids), len(parts.token_ids)
        return ChatResult(
            text=parts.content,
            reasoning_content=parts.reasoning or None,
            tool_calls=parts.calls or None,
            token_ids=parts.token_ids,
            prompt_token_ids=self.prompt.token_ids,
            finish_reason=parts.reason(finish_reason),
            usage=Usage(prompt_tokens=num_prompt, completion_tokens=num_new, total_tokens=num_prompt + num_new),
            timings=timings,
            logprobs=self.logprobs or None,
        )


class LLM:
    """A checkpoint, ready to answer.

    Args:
        model: checkpoint folder; None for the small one inside the package.
        dtype, device, compile, quantize: as on the command line.
        engine_options: sizes of the engine and whether it compiles, in place of `compile`.
        progress: show progress bars on stderr while loading.
        video_outer_wrapper: see `Processor.from_folder`.
        decoder: where images and clips are decoded, if not in processes of its own.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        compile: str = "auto",
        quantize: str = "none",
        progress: bool = False,
        video_outer_wrapper: bool = False,
        decoder: MediaDecoder | None = None,
        engine_options: EngineOptions | None = None,
        buffer_options: BufferOptions | None = None,
        encode_options: EncodeOptions | None = None,
    ) -> None:
        name = None if model is None else str(model)
        options = ModelOptions(model=name, dtype=dtype, device=device, compile=compile, quantize=quantize)  # type: ignore[arg-type]
        check_supported(options)
        encode_options = encode_options or EncodeOptions()
        encode_options.check()
        if options.dtype != "auto" and options.dtype not in DTYPES:
            raise InputError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}", param="dtype")
        self.folder = resolve_model_folder(name)
        self.device = resolve_device(device)
        torch_dtype = DTYPES.get(options.dtype)
        if decoder is None:
            decoder = MediaDecoder()
            decoder.warm_up()

        def make_processor(config: ModelConfig) -> Processor:
            return Processor.from_folder(self.folder, config, decoder=decoder, video_outer_wrapper=video_outer_wrapper)

        self.config, self.processor = check_folder(self.folder, make_processor)
        vision = load_vision_model(self.folder, dtype=torch_dtype, device=self.device, progress=progress)
        language = load_language_model(
            self.folder, dtype=torch_dtype, device=self.device, quantize=options.quantize, progress=progress
        )
        engine_options = engine_options or EngineOptions(compile=resolve_compile(compile, self.device))
        eos_ids = self.processor.generation.eos_token_ids
        self.engine = Engine(language, eos_ids=eos_ids, options=engine_options, progress=progress)
        worker = EncodeWorker(
            vision,
            self.processor.image,
            self.config,
            video=self.processor.video,
            decoder=decoder,
            compile=engine_options.compile,
        )
        buffers = MultimodalDataBuffers.from_options(
            self.config,
            buffer_options or BufferOptions(),
            dtype=language.model.embed_tokens.weight.dtype,
            device=self.device,
        )
        self.transfer = LocalTransfer(worker, Receiver(buffers, self.config), encode_options)
        self._num_requests = 0

    def chat(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        on_text: TextCallback | None = None,
        on_reasoning: TextCallback | None = None,
    ) -> list[ChatResult]:
        """Answer each conversation (messages in OpenAI form; local image paths allowed).

        `sampling`: one for all, one for each, or None for the checkpoint's own. `tools`: what the model may call, in
        OpenAI form, in all conversations. `on_text(i, piece)` gets conversation i's text as it comes, `on_reasoning`
        what is thought before it. Raises InputError for the first conversation that cannot be answered.
        """
        results = self.chat_each(conversations, sampling, tools=tools, on_text=on_text, on_reasoning=on_reasoning)
        for result in results:
            if isinstance(result, DisaggError):
                raise result
        return [result for result in results if isinstance(result, ChatResult)]

    def chat_each(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        on_text: TextCallback | None = None,
        on_reasoning: TextCallback | None = None,
    ) -> list[ChatResult | DisaggError]:
        """Like `chat`, but a conversation that fails leaves its error in its place and the others are answered."""
        if sampling is None:
            sampling = self.processor.generation.sampling()
        params = [sampling] * len(conversations) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(conversations):
            raise InputError(f"{len(conversations)} conversations but {len(params)} sampling parameters")
        tools = parse_tools(list(tools))
        results: list[ChatResult | DisaggError | None] = [None] * len(conversations)
        answers: dict[str, tuple[int, _Answer]] = {}
        for i, messages in enumerate(conversations):
            request_id = f"local-{self._num_requests}"
            self._num_requests += 1
            try:
                prompt = self.processor.prepare(messages, tools=tools, allow_paths=True)
                parts = AnswerParts(
                    self.processor.tokenizer,
                    self.engine.eos_ids,
                    params[i],
                    prompt.token_ids,
                    with_tools=bool(tools),
                )
                self.engine.add(request_id, prompt.token_ids, prompt.items, params[i])
            except InputError as error:
                results[i] = error
                continue
            answers[request_id] = (i, _Answer(prompt, parts))
        try:
            while answers:
                self.engine.scheduler.is_short_of_room = self.transfer.is_short_of_room
                events = self.engine.step()
                for event in events:
                    if event.request_id not in answers:
                        continue  # the same step brought the token that completed its stop string
                    i, answer = answers[event.request_id]
                    result = self._handle(event, answer, partial(_emit, on_text, on_reasoning, i))
                    if result is not None:
                        results[i] = result
                        del answers[event.request_id]
                        self.transfer.forget(event.request_id)
                outcomes = self._move_rows()
                for outcome in outcomes:
                    if isinstance(outcome, ItemError) and outcome.request_id in answers:
                        results[answers.pop(outcome.request_id)[0]] = outcome.error
                if not events and not outcomes and not self.engine.has_work:
                    raise RuntimeError(f"nothing moves, and {len(answers)} requests are not answered")
        finally:
            for request_id in answers:
                self.engine.cancel(request_id)
                self.transfer.forget(request_id)
            self._move_rows()
        return [result for result in results if result is not None]

    def _move_rows(self) -> list[Outcome]:
        """Bring over what can be brought, and give it to the engine."""
        moved: list[Outcome] = []
        while outcomes := self.transfer.run():
            moved += outcomes
            for outcome in outcomes:
                match outcome:
                    case Delivery():
                        delivered = outcome.request_id, outcome.item, outcome.rows, outcome.timings()
                        for event in self.engine.provide_rows(*delivered):
                            if isinstance(event, RowsUsed):
                                self.transfer.consumed(event.request_id, event.item, event.attempt, event.rows)
                    case ItemError():
                        self.engine.cancel(outcome.request_id)
                        self.transfer.forget(outcome.request_id)
                    case _:
                        self.engine.restart_item(outcome.request_id, outcome.item)
                        self.transfer.returned(outcome)
        return moved

    def _handle(
        self, event: EngineEvent, answer: _Answer, emit: Callable[[Parts], None]
    ) -> ChatResult | DisaggError | None:
        match event:
            case NeedItems():
                prompt = answer.prompt
                self.transfer.need(event.request_id, prompt.items, event.items, prompt.media, event.first_rows)
                return None
            case Preempted():
                self.transfer.need(event.request_id, answer.prompt.items, [], answer.prompt.media)
                return None
            case RowsUsed():
                self.transfer.consumed(event.request_id, event.item, event.attempt, event.rows)
                return None
            case Tokens():
                return self._tokens(event, answer, emit)
            case RequestFailed():
                return InputError(event.message, status=event.status, code=event.code)
            case Finished():
                emit(answer.parts.finish())
                return answer.result(event.finish_reason, event.timings)

    def _tokens(self, event: Tokens, answer: _Answer, emit: Callable[[Parts], None]) -> ChatResult | None:
        """Take tokens in; the result when one of them completes a stop string."""
        if event.timings is not None:
            answer.first_timings, answer.first_token_at = event.timings, time.monotonic()
        for number, token_id in enumerate(event.token_ids):
            emit(answer.parts.push(token_id))
            if event.logprobs:
                answer.logprobs.append(event.logprobs[number])
            if answer.parts.is_stopped:
                self.engine.cancel(event.request_id)
                decode_ms = (time.monotonic() - answer.first_token_at) * 1e3
                return answer.result("stop", msgspec.structs.replace(answer.first_timings, decode=decode_ms))
        return None


def tokens_per_second(results: Sequence[ChatResult], started: float) -> float:
    """New tokens of all results per second of wall time since `started` (`time.monotonic`)."""
    return sum(len(result.token_ids) for result in results) / max(time.monotonic() - started, 1e-9)
