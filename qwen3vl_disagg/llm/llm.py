"""`LLM`: the whole system in one process: encode worker, in-process transfer, engine."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, Literal, TypeVar

from qwen3vl_disagg.checkpoint import load_language_model, load_vision_model
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.checkpoint.load import check_folder
from qwen3vl_disagg.core.devices import DTYPES, resolve_compile, resolve_device
from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.core.progress import Progress
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import (
    BufferOptions,
    EncodeOptions,
    EngineSettings,
    ModelOptions,
    TaskChoice,
    check_supported,
)
from qwen3vl_disagg.encode.shared_gpu import SharedGpu
from qwen3vl_disagg.encode.worker import EncodeWorker
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.engine.grammars import Grammars
from qwen3vl_disagg.language.engine_thread import Command
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.llm.requests import Ended, LocalRequests
from qwen3vl_disagg.llm.results import ChatResult, EmbedResult, ScoreResult, chat_result, embed_result, score_result
from qwen3vl_disagg.llm.transfer import LocalTransfer
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.kv_room import measured_room
from qwen3vl_disagg.processing import AnswerParts, Parts, Processor, parse_tools
from qwen3vl_disagg.processing.bad_words import with_ids
from qwen3vl_disagg.processing.pooling import (
    Conversation,
    check_task,
    embed_messages,
    pair_messages,
    parts_of,
    sized,
    with_instruction,
)
from qwen3vl_disagg.processing.prompt_options import PromptOptions
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers

T = TypeVar("T")
TextCallback = Callable[[int, str], None]
_Start = Callable[[dict[int, T | DisaggError], int], str]
"""Begins a request whose result will be the one of that number; its name. DisaggError if it cannot be answered."""
LONG_BYTES = 1 << 30
"""Of weights: to read so many is said."""
MAX_AHEAD_BYTES = 256 << 20
"""Images and clips of conversations that are prepared and not answered; a single one may have more."""


def _emit(on_text: TextCallback | None, on_reasoning: TextCallback | None, i: int, new: Parts) -> None:
    if new.reasoning and on_reasoning is not None:
        on_reasoning(i, new.reasoning)
    if new.content and on_text is not None:
        on_text(i, new.content)


class LLM:
    """A checkpoint, ready to answer.

    Args:
        model: checkpoint folder; None for the small one inside the package.
        dtype, device, compile, quantize, image_resize: as on the command line.
        engine_options: sizes of the engine and whether it compiles, in place of `compile`.
        progress: bars on stderr while loading takes more than a second; None: if that is a terminal. Where there are
            none, what takes long (a GiB of weights, compiling, building the kernels) is said in a line of the log each,
            which a program sees that logs `INFO`.
        kv_cache_gib, max_running, max_prefill_tokens, page_size: as on the command line.
        video_outer_wrapper: see `Processor.from_folder`.
        decoder: where images and clips are decoded, if not in processes of its own.
        task: as on the command line.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        compile: str = "auto",
        quantize: str = "none",
        progress: bool | None = None,
        video_outer_wrapper: bool = False,
        image_resize: str = "torch",
        decoder: MediaDecoder | None = None,
        engine_options: EngineOptions | None = None,
        buffer_options: BufferOptions | None = None,
        encode_options: EncodeOptions | None = None,
        kv_cache_gib: Literal["auto"] | float = "auto",
        max_running: int = EngineSettings.max_running,
        max_prefill_tokens: int = EngineSettings.max_prefill_tokens,
        page_size: int | None = None,
        task: TaskChoice = "auto",
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
            task=task,
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
                task=options.task,
            )

        self.config, self.processor = check_folder(self.folder, make_processor, dtype=options.dtype)
        start = Progress()
        progress = sys.stderr.isatty() if progress is None else progress

        def on_size(num_bytes: int) -> None:
            if num_bytes >= LONG_BYTES and not progress:
                start.weights("decoder", num_bytes)

        vision = load_vision_model(self.folder, dtype=torch_dtype, device=self.device, progress=progress)
        language = load_language_model(
            self.folder,
            dtype=torch_dtype,
            device=self.device,
            quantize=options.quantize,
            progress=progress,
            on_size=on_size,
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
        if engine_options.compile and not progress:
            start.stage("compile", "compiling the decoder's steps")
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

        config, torch_device, gpu = self.config, self.device, None
        if self.device.type == "cuda":
            gpu = SharedGpu(self.device, encode_options.tower_slowdown)
            worker.share(gpu)
            # A step that was begun ahead of the host may still write to memory that would go to somebody else.
            weakref.finalize(self.engine, gpu.wait_for_decoder).atexit = False

        def make_transfer(post: Callable[[Command], None]) -> LocalTransfer:
            buffers = MultimodalDataBuffers.from_options(
                config, buffer_options or BufferOptions(), dtype=weight.dtype, device=torch_device
            )
            receiver = Receiver(buffers, config)
            return LocalTransfer(worker, receiver, post, encode_options, is_between_steps=gpu is None)

        self._requests = LocalRequests(self.engine, make_transfer, gpu)

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
        what is thought before it; both of its first answer only. Raises the error of the first conversation that cannot
        be answered.
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
        check_task(self.processor.task, "generate", "a chat")
        if sampling is None:
            sampling = self.processor.generation.sampling()
        ahead = 2 * self.engine.options.max_running if ahead is None else ahead
        if ahead < 1:
            raise InputError(f"ahead is {ahead}: must be at least 1", param="ahead")
        params = repeat(sampling) if isinstance(sampling, SamplingParams) else chain(sampling, repeat(None))
        pairs = zip(conversations, params, strict=False)
        shown, emit = parse_tools(list(tools)), partial(_emit, on_text, on_reasoning)
        return self._answer((partial(self._begin, *pair, shown, emit) for pair in pairs), ahead)

    def embed(
        self,
        inputs: Sequence[str | dict[str, Any] | Conversation],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
    ) -> list[EmbedResult]:
        """A vector of each input: a text, an object with `text`, `image` and `video`, or a conversation.

        `instruction`: what the vectors are for; an object may have its own. `dimensions`: so many numbers of each, the
        first ones. Raises the error of the first input that has none.
        """
        check_task(self.processor.task, "embed", "embed")
        sampling = self.processor.pooling(dimensions)

        def make(number: int) -> Any:
            given = inputs[number]
            if isinstance(given, list):
                return with_instruction(given, instruction)
            return embed_messages(given, instruction, f"inputs[{number}]")

        return list(map(embed_result, self._pool(make, range(len(inputs)), sampling)))

    def score(
        self, query: str | dict[str, Any], documents: Sequence[str | dict[str, Any]], *, instruction: str | None = None
    ) -> list[ScoreResult]:
        """How well each document answers the query; both are texts, or objects with `text`, `image` and `video`.

        `instruction`: what is looked for. Raises the error of the first document that has no score.
        """
        check_task(self.processor.task, "rerank", "score")
        sampling = self.processor.pooling()
        asked = parts_of(query, "query")

        def make(number: int) -> Conversation:
            where = f"documents[{number}]"
            return pair_messages(asked, parts_of(documents[number], where), instruction, where)

        # What all begin with is computed for the first one, and found by the others.
        numbers = range(len(documents))
        return [score_result(one) for some in (numbers[:1], numbers[1:]) for one in self._pool(make, some, sampling)]

    def _pool(self, make: Callable[[int], Conversation], numbers: range, sampling: SamplingParams) -> list[Ended]:
        """What becomes of the conversations of these numbers. Raises the error of the first that fails."""

        def begin(number: int, results: dict[int, Ended | DisaggError], place: int) -> str:
            prompt = self.processor.prepare(make(number), allow_paths=True, options=sized(PromptOptions()))
            parts = [AnswerParts(self.processor.tokenizer, self.engine.eos_ids, sampling, None)]
            return self._requests.begin(
                prompt, parts, sampling, emit=lambda _: None, done=partial(results.__setitem__, place)
            )

        found = []
        for ended in self._answer((partial(begin, number) for number in numbers), 2 * self.engine.options.max_running):
            if isinstance(ended, DisaggError):
                raise ended
            found.append(ended)
        return found

    def _answer(self, starts: Iterator[_Start[T]], ahead: int) -> Iterator[T | DisaggError]:
        requests = self._requests
        results: dict[int, T | DisaggError] = {}
        begun: dict[int, str] = {}
        num_taken, is_more = 0, True
        try:
            for number in count():
                while number not in results:
                    if is_more and num_taken < number + ahead and requests.media_bytes < MAX_AHEAD_BYTES:
                        start = next(starts, None)
                        if start is None:
                            is_more = False
                            continue
                        try:
                            begun[num_taken] = start(results, num_taken)
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
        emit: Callable[[int, Parts], None],
        results: dict[int, ChatResult | DisaggError],
        number: int,
    ) -> str:
        """A `_Start` of a conversation."""
        if isinstance(conversation, DisaggError):
            raise conversation
        if not isinstance(params, SamplingParams):
            raise InputError(f"no SamplingParams for conversation {number}, but {params!r}", param="sampling")

        if params.prompt_logprobs is not None:
            raise InputError("prompt_logprobs are for HTTP only", param="prompt_logprobs")

        def done(ended: Ended | DisaggError) -> None:
            results[number] = ended if isinstance(ended, DisaggError) else chat_result(ended)

        prompt = self.processor.prepare(conversation, tools=tools, allow_paths=True)
        eos_ids, is_given = self.engine.eos_ids, bool(tools)
        tokenizer, ids = self.processor.tokenizer, prompt.token_ids
        parts = [AnswerParts(tokenizer, eos_ids, params, ids, with_tools=is_given) for _ in range(params.n)]
        sampling = with_ids(params, tokenizer)
        return self._requests.begin(prompt, parts, sampling, emit=partial(emit, number), done=done)
