"""`LLM`: the whole system in one process: encode worker, in-process transfer, engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, Literal

import msgspec

from qwen3vl_disagg.checkpoint import load_language_model, load_vision_model
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.checkpoint.load import check_folder
from qwen3vl_disagg.core.devices import DTYPES, resolve_compile, resolve_device
from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams, TokenLogprob
from qwen3vl_disagg.core.settings import BufferOptions, EncodeOptions, EngineSettings, ModelOptions, check_supported
from qwen3vl_disagg.encode.worker import EncodeWorker
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.engine.grammars import Grammars
from qwen3vl_disagg.language.engine_thread import Command
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.llm.requests import Ended, LocalRequests
from qwen3vl_disagg.llm.transfer import LocalTransfer
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.kv_room import measured_room
from qwen3vl_disagg.processing import AnswerParts, AnswerReason, Parts, Processor, ToolCall, parse_tools
from qwen3vl_disagg.processing.bad_words import with_ids
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers

TextCallback = Callable[[int, str], None]
Conversation = list[dict[str, Any]]
MAX_AHEAD_BYTES = 256 << 20
"""Images and clips of conversations that are prepared and not answered; a single one may have more."""


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


def _result(ended: Ended) -> ChatResult:
    parts = ended.parts
    num_prompt, num_new = len(ended.prompt.token_ids), len(parts.token_ids)
    return ChatResult(
        text=parts.content,
        reasoning_content=parts.reasoning or None,
        tool_calls=parts.calls or None,
        token_ids=parts.token_ids,
        prompt_token_ids=ended.prompt.token_ids,
        finish_reason=parts.reason(ended.finish_reason),
        usage=Usage(prompt_tokens=num_prompt, completion_tokens=num_new, total_tokens=num_prompt + num_new),
        timings=ended.timings,
        logprobs=ended.logprobs or None,
    )


class LLM:
    """A checkpoint, ready to answer.

    Args:
        model: checkpoint folder; None for the small one inside the package.
        dtype, device, compile, quantize, image_resize: as on the command line.
        engine_options: sizes of the engine and whether it compiles, in place of `compile`.
        progress: show progress bars on stderr while loading.
        kv_cache_gib, max_running, max_prefill_tokens, page_size: as on the command line.
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
        image_resize: str = "torch",
        decoder: MediaDecoder | None = None,
        engine_options: EngineOptions | None = None,
        buffer_options: BufferOptions | None = None,
        encode_options: EncodeOptions | None = None,
        kv_cache_gib: Literal["auto"] | float = "auto",
        max_running: int = EngineSettings.max_running,
        max_prefill_tokens: int = EngineSettings.max_prefill_tokens,
        page_size: int = EngineSettings.page_size,
    ) -> None:
        name = None if model is None else str(model)
        options = ModelOptions(
            model=name,
            dtype=dtype,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
            compile=compile,  # type: ignore[arg-type]
            quantize=quantize,  # type: ignore[arg-type]
            image_resize=image_resize,  # type: ignore[arg-type]
            kv_cache_gib=kv_cache_gib,
            max_running=max_running,
            max_prefill_tokens=max_prefill_tokens,
            page_size=page_size,
        )
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
            return Processor.from_folder(
                self.folder,
                config,
                decoder=decoder,
                video_outer_wrapper=video_outer_wrapper,
                image_resize=options.image_resize,
            )

        self.config, self.processor = check_folder(self.folder, make_processor, dtype=options.dtype)
        vision = load_vision_model(self.folder, dtype=torch_dtype, device=self.device, progress=progress)
        language = load_language_model(
            self.folder, dtype=torch_dtype, device=self.device, quantize=options.quantize, progress=progress
        )
        engine_options = engine_options or EngineOptions.of(options, compile=resolve_compile(compile, self.device))
        weight = language.model.embed_tokens.weight
        room = measured_room(
            self.config,
            engine_options,
            self.device,
            weight.dtype,
            image_rows=self.processor.image.max_rows,
        )
        eos_ids = self.processor.generation.eos_token_ids
        processor = self.processor  # what a thread of the transfer holds must not hold this object
        self.engine = Engine(
            language,
            eos_ids=eos_ids,
            options=engine_options,
            room=room,
            progress=progress,
            grammars=Grammars.of(lambda: processor.tokenizer, self.config, eos_ids),
        )
        worker = EncodeWorker(
            vision,
            self.processor.image,
            self.config,
            video=self.processor.video,
            decoder=decoder,
            compile=engine_options.compile,
        )

        config, torch_device = self.config, self.device

        def make_transfer(post: Callable[[Command], None]) -> LocalTransfer:
            buffers = MultimodalDataBuffers.from_options(
                config, buffer_options or BufferOptions(), dtype=weight.dtype, device=torch_device
            )
            return LocalTransfer(worker, Receiver(buffers, config), post, encode_options)

        self._requests = LocalRequests(self.engine, make_transfer)

    @property
    def transfer(self) -> LocalTransfer:
        """The way of images and clips to the engine."""
        return self._requests.transfer

    def chat(
        self,
        conversations: Sequence[Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        on_text: TextCallback | None = None,
        on_reasoning: TextCallback | None = None,
    ) -> list[ChatResult]:
        """Answer each conversation (messages in OpenAI form; images also as names, paths, bytes or PIL images).

        `sampling`: one for all, one for each, or None for the checkpoint's own. `tools`: what the model may call, in
        OpenAI form, in all conversations. `on_text(i, piece)` gets conversation i's text as it comes, `on_reasoning`
        what is thought before it. Raises the error of the first conversation that cannot be answered.
        """
        results = self.chat_each(conversations, sampling, tools=tools, on_text=on_text, on_reasoning=on_reasoning)
        for result in results:
            if isinstance(result, DisaggError):
                raise result
        return [result for result in results if isinstance(result, ChatResult)]

    def chat_each(
        self,
        conversations: Sequence[Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        on_text: TextCallback | None = None,
        on_reasoning: TextCallback | None = None,
    ) -> list[ChatResult | DisaggError]:
        """Like `chat`, but a conversation that fails leaves its error in its place and the others are answered."""
        if sampling is not None and not isinstance(sampling, SamplingParams) and len(sampling) != len(conversations):
            raise InputError(f"{len(conversations)} conversations but {len(sampling)} sampling parameters")
        return list(self.chat_iter(conversations, sampling, tools=tools, on_text=on_text, on_reasoning=on_reasoning))

    def chat_iter(
        self,
        conversations: Iterable[Conversation | DisaggError],
        sampling: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        on_text: TextCallback | None = None,
        on_reasoning: TextCallback | None = None,
        ahead: int | None = None,
    ) -> Iterator[ChatResult | DisaggError]:
        """Like `chat_each`, one result after another, in order; conversations are taken when they are needed.

        At most `ahead` conversations (default: twice as many as the engine runs at once) are taken whose results were
        not given back, and no more while those under way hold MAX_AHEAD_BYTES of images and clips. An error in place of
        a conversation stays in its place. When the iterator is closed, or something is raised on the way, all that is
        under way is given up.
        """
        if sampling is None:
            sampling = self.processor.generation.sampling()
        ahead = 2 * self.engine.options.max_running if ahead is None else ahead
        if ahead < 1:
            raise InputError(f"ahead is {ahead}: must be at least 1", param="ahead")
        params = repeat(sampling) if isinstance(sampling, SamplingParams) else chain(sampling, repeat(None))
        pairs = zip(conversations, params, strict=False)
        return self._answer(pairs, parse_tools(list(tools)), partial(_emit, on_text, on_reasoning), ahead)

    def _answer(
        self,
        pairs: Iterator[tuple[Conversation | DisaggError, SamplingParams | None]],
        tools: list[dict[str, Any]],
        emit: Callable[[int, Parts], None],
        ahead: int,
    ) -> Iterator[ChatResult | DisaggError]:
        requests = self._requests
        results: dict[int, ChatResult | DisaggError] = {}
        begun: dict[int, str] = {}
        num_taken, is_more = 0, True
        try:
            for number in count():
                while number not in results:
                    if is_more and num_taken < number + ahead and requests.media_bytes < MAX_AHEAD_BYTES:
                        pair = next(pairs, None)
                        if pair is None:
                            is_more = False
                            continue
                        try:
                            begun[num_taken] = self._begin(*pair, tools, partial(emit, num_taken), results, num_taken)
                        except DisaggError as error:
                            results[num_taken] = error
                        num_taken += 1
                    elif is_more or number < num_taken:
                        requests.step()
                    else:
                        return
                begun.pop(number, None)
                yield results.pop(number)
        finally:
            requests.give_up(list(begun.values()))

    def _begin(
        self,
        conversation: Conversation | DisaggError,
        params: SamplingParams | None,
        tools: list[dict[str, Any]],
        emit: Callable[[Parts], None],
        results: dict[int, ChatResult | DisaggError],
        number: int,
    ) -> str:
        """Prepare and queue one, whose result will be `results[number]`. DisaggError if it cannot be answered."""
        if isinstance(conversation, DisaggError):
            raise conversation
        if not isinstance(params, SamplingParams):
            raise InputError(f"no SamplingParams for conversation {number}, but {params!r}", param="sampling")

        if params.prompt_logprobs is not None:
            raise InputError("prompt_logprobs are for HTTP only", param="prompt_logprobs")

        def done(ended: Ended | DisaggError) -> None:
            results[number] = ended if isinstance(ended, DisaggError) else _result(ended)

        prompt = self.processor.prepare(conversation, tools=tools, allow_paths=True)
        eos_ids, is_given = self.engine.eos_ids, bool(tools)
        parts = AnswerParts(self.processor.tokenizer, eos_ids, params, prompt.token_ids, with_tools=is_given)
        sampling = with_ids(params, self.processor.tokenizer)
        return self._requests.begin(prompt, parts, sampling, emit=emit, done=done)
