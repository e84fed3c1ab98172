"""Messages -> prompt: token ids with placeholders expanded, and the visual items that fill them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import CheckpointError, InputError, attempt
from qwen3vl_disagg.core.pooling import Pooling
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.core.settings import ImageResize, Task, TaskChoice
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.processing.clips import VideoProcessor
from qwen3vl_disagg.processing.generation import GenerationDefaults
from qwen3vl_disagg.processing.media_plan import MediaPlanner, Plan
from qwen3vl_disagg.processing.messages import parse_messages
from qwen3vl_disagg.processing.patches import ImageProcessor
from qwen3vl_disagg.processing.pooling import ANSWERS, find_task
from qwen3vl_disagg.processing.prompt_options import PromptOptions
from qwen3vl_disagg.processing.template import ChatTemplate, PromptPiece, strings_of
from qwen3vl_disagg.processing.tokenizer import (
    IM_END,
    IMAGE_PAD,
    STRUCTURAL,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Tokenizer,
    TooManyTokens,
)

SMALL_CHARS = 2**14
"""Text of a prompt that is tokenized without a look at its length: it takes a few milliseconds."""
_PADS = {"image": IMAGE_PAD, "video": VIDEO_PAD}


@dataclass(frozen=True)
class Prompt:
    """What a request asks: ids with expanded placeholders, and for each visual item its header facts and bytes."""

    token_ids: list[int]
    items: list[VisualItem]
    media: list[bytes]


def _least_bytes(text: str) -> int:
    """Of a text in UTF-8, once it is composed: NFC makes one character of up to four."""
    return len(text) if text.isascii() else len(text) // 4


def _too_long(what: str, context: int, param: str = "messages") -> InputError:
    return InputError(f"{what}, the context is {context}", param=param, code="context_length_exceeded")


@dataclass(frozen=True)
class _Run:
    """Placeholders of an item: of all of an image, of one step of a clip's grid."""

    number: int


class Processor:
    """Everything between a caller's messages and token ids.

    No pixels are made: headers give exact row counts. Of a clip's file a decoding child reads all packets, and decodes
    the first frame.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        image: ImageProcessor,
        template: ChatTemplate,
        generation: GenerationDefaults,
        *,
        video: VideoProcessor | None = None,
        decoder: MediaDecoder | None = None,
        video_outer_wrapper: bool = False,
        max_model_len: int | None = None,
        task: Task = "generate",
    ) -> None:
        self.task = task
        self.config, self.tokenizer, self.image, self.video = config, tokenizer, image, video
        self.template, self.generation = template, generation
        self.decoder = decoder or MediaDecoder()
        self.max_model_len = config.text.max_position_embeddings if max_model_len is None else max_model_len
        """Tokens of a prompt and its answer together."""
        self.folder: Path | None = None
        """What it was read from, if it was."""
        self.video_outer_wrapper = video_outer_wrapper

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        config: ModelConfig,
        *,
        decoder: MediaDecoder | None = None,
        video_outer_wrapper: bool = False,
        image_resize: ImageResize = "torch",
        max_model_len: int | None = None,
        task: TaskChoice = "auto",
    ) -> Processor:
        """Read tokenizer, template, image and video settings and sampling defaults. CheckpointError says what is wrong.

        `decoder`: for clips, whose headers only a decoder understands. `video_outer_wrapper`: whether a clip keeps
        the pair of start and end that templates write around it, besides those of its frames. The models were made
        without it; transformers 5 has it. `image_resize`: as on the command line; it changes pixels, not prompts.
        `max_model_len`: default the checkpoint's context, which it must not exceed. `task`: as on the command line.
        """
        problems: list[str] = []
        tokenizer = attempt(problems, lambda: _read_tokenizer(folder, config))
        image = attempt(problems, lambda: ImageProcessor.from_folder(folder, config.vision, resize=image_resize))
        video = attempt(problems, lambda: VideoProcessor.from_folder(folder, config.vision, resize=image_resize))
        # Without a tokenizer, what else is wrong is told with these in place of its own.
        names = STRUCTURAL if tokenizer is None else list(tokenizer.special_ids)
        end = 0 if tokenizer is None else tokenizer.token_id(IM_END)
        template = attempt(problems, lambda: ChatTemplate.from_folder(folder, names))
        found = attempt(problems, lambda: find_task(folder, task))
        if found == "rerank" and tokenizer is not None:
            lacking = [name for name in ANSWERS if tokenizer.backend.token_to_id(name) is None]
            problems += [f"tokenizer.json: no token {name!r}, which a reranker needs" for name in lacking]
        generation = attempt(problems, lambda: GenerationDefaults.from_folder(folder, default_eos=end))
        if generation is not None:
            size = config.text.vocab_size
            strange = sorted(i for i in generation.eos_token_ids if not 0 <= i < size)
            reason = f"is not in the vocabulary of {size}"
            problems += [f"generation_config.json: eos_token_id {i} {reason}" for i in strange]
        if problems or found is None or tokenizer is None or image is None or template is None or generation is None:
            raise CheckpointError(folder, problems)
        processor = cls(
            config,
            tokenizer,
            image,
            template,
            generation,
            video=video,
            decoder=decoder,
            video_outer_wrapper=video_outer_wrapper,
            max_model_len=max_model_len,
            task=found,
        )
        processor.folder = folder
        return processor

    def prepare(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        allow_paths: bool = False,
        options: PromptOptions | None = None,
        stop: StopSignal | None = None,
        planner: MediaPlanner | None = None,
    ) -> Prompt:
        """Check, render, tokenize and expand. InputError names the place of whatever is wrong.

        `messages` in OpenAI chat form; images and videos are data: URIs, and with `allow_paths` also local files or
        bytes. Setting `stop` from another thread ends the look at the media with Stopped, in 0.2 s. `planner`: that of
        other prompts of the same request.
        """
        options = options or PromptOptions()
        context = self.max_model_len
        checked, media = parse_messages(messages, allow_paths=allow_paths)
        self._check_chars([checked, tools], context)
        planner = planner or self.planner(options, stop)
        plans = planner.plan_all(media, context)
        pieces = self.template.render(
            checked,
            tools=tools,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            variables=options.variables,
            thinking=options.thinking,
        )
        slots = [piece.text for piece in pieces if piece.is_special and piece.text in _PADS.values()]
        if slots != [_PADS[entry.modality] for entry in media]:
            raise InputError(
                f"the chat template made room for {len(slots)} of {len(media)} images and videos, or in another order",
                param="messages",
            )
        token_ids, items = self._lay_out(list(self._expand(pieces, plans)), plans, context, options.cache_salt)
        token_ids += self._ending if self.task != "generate" else []
        if len(token_ids) >= context:
            raise _too_long(f"the prompt has {len(token_ids)} tokens", context)
        return Prompt(token_ids, items, [entry.data for entry in media])

    def planner(self, options: PromptOptions, stop: StopSignal | None = None) -> MediaPlanner:
        stop = stop or StopSignal()
        return MediaPlanner(self.image, self.video, self.decoder, stop, of_images=options.image, of_clips=options.clip)

    @cached_property
    def _ending(self) -> list[int]:
        """What the tokenizer itself puts behind a text that is read and not answered."""
        return self.tokenizer.backend.encode("").ids

    def pooling(self, dimensions: int | None = None, *, cache_salt: str = "") -> SamplingParams:
        """What is wanted of a prompt, where the model does not answer. InputError for more numbers than there are."""
        size, pooling = self.config.text.hidden_size, Pooling(dimensions=dimensions or 0)
        if self.task == "rerank":
            ids = map(self.tokenizer.backend.token_to_id, ANSWERS)
            yes, no = (token_id for token_id in ids if token_id is not None)
            pooling = Pooling(tokens=(yes, no))
        elif dimensions is not None and not 1 <= dimensions <= size:
            raise InputError(f"dimensions is {dimensions}: must be from 1 to {size}", param="dimensions")
        return SamplingParams(max_new_tokens=1, pooling=pooling, cache_salt=cache_salt)

    def text_ids(self, text: str, param: str) -> list[int]:
        """A text as it is; nothing in it becomes a special token. InputError for as much as the context or more."""
        context = self.max_model_len
        self._check_chars(text, context, param)
        if len(text) > SMALL_CHARS and (least := self.tokenizer.num_tokens_at_least(text)) >= context:
            raise _too_long(f"{param} has at least {least} tokens", context, param)
        try:
            token_ids = self.tokenizer.encode(text, at_most=context - 1)
        except TooManyTokens as error:
            raise _too_long(f"{param} has more than {error.count - 1} tokens", context, param) from None
        return token_ids

    def _check_chars(self, values: Any, context: int, param: str = "messages") -> None:
        """InputError for more text than `context` tokens can hold, before anything is made of it."""
        num_chars = sum(_least_bytes(text) for text in strings_of(values))
        if num_chars > SMALL_CHARS and num_chars > context * self.tokenizer.max_token_bytes:
            raise _too_long(f"the text has at least {num_chars} bytes, more than fit", context, param)

    def _expand(self, pieces: list[PromptPiece], plans: list[Plan]) -> Iterator[PromptPiece | _Run]:
        """Placeholders become runs. Each frame of a clip gets its time before it and its own start and end; the
        template's pair around the whole clip stays only with `video_outer_wrapper`."""
        start, end = PromptPiece(VISION_START, True), PromptPiece(VISION_END, True)
        numbers = iter(range(len(plans)))
        for place, piece in enumerate(pieces):
            if piece == PromptPiece(IMAGE_PAD, True):
                yield _Run(next(numbers))
            elif piece == PromptPiece(VIDEO_PAD, True):
                number = next(numbers)
                for time in plans[number].times:
                    yield from (PromptPiece(f"<{time:.1f} seconds>", False), start, _Run(number), end)
            elif self.video_outer_wrapper or not _is_beside_clip(pieces, place):
                yield piece

    def _lay_out(
        self, parts: list[PromptPiece | _Run], plans: list[Plan], context: int, salt: str
    ) -> tuple[list[int], list[VisualItem]]:
        """Tokenize; neighbouring text is one string. InputError for more than the context, as soon as that is certain:
        what is there from lengths alone is counted before the first text is tokenized."""
        vision, tokenizer = self.config.vision, self.tokenizer
        texts = [part.text for part in parts if isinstance(part, PromptPiece) and not part.is_special]
        num_fixed = sum(plans[part.number].run_rows(vision) if isinstance(part, _Run) else 1 for part in parts)
        num_fixed -= len(texts)
        if sum(map(len, texts)) > SMALL_CHARS:
            least = num_fixed + tokenizer.num_tokens_at_least("".join(texts))
            if least >= context:
                raise _too_long(f"the prompt has at least {least} tokens", context)
        token_ids: list[int] = []
        runs: list[list[int]] = [[] for _ in plans]
        text = ""
        for part in [*parts, None]:
            if isinstance(part, PromptPiece) and not part.is_special:
                text += part.text
                continue
            try:
                token_ids += tokenizer.encode(text, at_most=context - len(token_ids)) if text else []
            except TooManyTokens as error:
                raise _too_long(f"the prompt has more than {len(token_ids) + error.count} tokens", context) from None
            text = ""
            if isinstance(part, PromptPiece):
                token_ids.append(self.tokenizer.token_id(part.text))
            elif part is not None:
                plan = plans[part.number]
                runs[part.number].append(len(token_ids))
                token_ids += [self.tokenizer.token_id(_PADS[plan.modality])] * plan.run_rows(self.config.vision)
        return token_ids, [plan.item(where, vision, salt) for plan, where in zip(plans, runs, strict=True)]


def _is_beside_clip(pieces: list[PromptPiece], place: int) -> bool:
    """Whether this is the start or end that the template wrote around a clip's placeholder."""
    clip = PromptPiece(VIDEO_PAD, True)
    if pieces[place] == PromptPiece(VISION_START, True):
        return pieces[place + 1 : place + 2] == [clip]
    return pieces[place] == PromptPiece(VISION_END, True) and place > 0 and pieces[place - 1] == clip


def _read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """CheckpointError for one that does not fit the config, too."""
    tokenizer = Tokenizer.from_folder(folder)
    problems = [
        f"tokenizer.json: {name} has id {tokenizer.token_id(name)}, config.json says {expected}"
        for name, expected in (
            (IMAGE_PAD, config.image_token_id),
            (VIDEO_PAD, config.video_token_id),
            (VISION_START, config.vision_start_token_id),
            (VISION_END, config.vision_end_token_id),
        )
        if tokenizer.token_id(name) != expected
    ]
    if tokenizer.vocab_size > config.text.vocab_size:
        problems.append(
            f"tokenizer.json: {tokenizer.vocab_size} tokens, config.json has room for {config.text.vocab_size}"
        )
    if problems:
        raise CheckpointError(folder, problems)
    return tokenizer
