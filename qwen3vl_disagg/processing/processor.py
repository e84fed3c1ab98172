"""Messages -> prompt: token ids with placeholders expanded, and the visual items that fill them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import CheckpointError, DisaggError, InputError, attempt
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import ImageResize
from qwen3vl_disagg.media.decoder import MediaDecoder
from qwen3vl_disagg.media.images import ImageInfo
from qwen3vl_disagg.media.stop import Stop
from qwen3vl_disagg.media.video import VideoInfo
from qwen3vl_disagg.model.config import ModelConfig, VisionConfig
from qwen3vl_disagg.processing.generation import GenerationDefaults
from qwen3vl_disagg.processing.images import ImageProcessor
from qwen3vl_disagg.processing.media_parts import Media
from qwen3vl_disagg.processing.messages import parse_messages
from qwen3vl_disagg.processing.positions import Grid
from qwen3vl_disagg.processing.template import ChatTemplate, Piece
from qwen3vl_disagg.processing.tokenizer import (
    IM_END,
    IMAGE_PAD,
    STRUCTURAL,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Tokenizer,
)
from qwen3vl_disagg.processing.video import UNKNOWN_FPS, VIDEO_FILE, VideoProcessor, timestamps, unpack_frames

MAX_STILL_PIXELS = 2**31
"""To decode for one request, in images and in lists of frames: 768 frames of 1080p fit."""
MAX_FILE_PIXELS = 2**33
"""To decode for one request, in files of clips."""
_PADS = {"image": IMAGE_PAD, "video": VIDEO_PAD}


@dataclass(frozen=True)
class Prompt:
    """What a request asks: ids with expanded placeholders, and for each visual item its header facts and bytes."""

    token_ids: list[int]
    items: list[VisualItem]
    media: list[bytes]


@dataclass(frozen=True)
class _Plan:
    """What a header says about an item. Of a clip: the frames to look at, and the seconds of each step of the grid."""

    media: Media
    grid: Grid
    frames: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    num_pixels: int = 0
    """What has to be decoded: of a file all frames up to the last one that is looked at."""

    def run_rows(self, vision: VisionConfig) -> int:
        return self.grid[1] * self.grid[2] // vision.merge_unit

    def item(self, runs: list[int], vision: VisionConfig) -> VisualItem:
        """`runs`: where its placeholders begin."""
        return VisualItem(
            modality=self.media.modality,
            digest=hashlib.sha256(self.media.data).hexdigest(),
            num_bytes=len(self.media.data),
            grid=self.grid,
            num_rows=self.grid[0] * self.run_rows(vision),
            offset=runs[0],
            param=self.media.param,
            run_offsets=tuple(runs) if self.media.modality == "video" else (),
            frames=self.frames,
            is_frame_list=self.media.is_frame_list,
        )


@dataclass(frozen=True)
class _Run:
    """Placeholders of an item: of all of an image, of one step of a clip's grid."""

    number: int


class _Headers:
    """What the headers of one request's media say. Equal bytes are looked at once; Stopped once `stop` is set."""

    def __init__(self, image: ImageProcessor, decoder: MediaDecoder, stop: Stop) -> None:
        self._image, self._decoder, self._stop = image, decoder, stop
        self._images: dict[bytes, ImageInfo] = {}
        self._clips: dict[bytes, VideoInfo] = {}

    def image(self, data: bytes) -> ImageInfo:
        self._stop.check()
        info = self._images.get(data)
        if info is None:
            info = self._images[data] = self._image.probe(data)
        return info

    def clip(self, data: bytes) -> VideoInfo:
        self._stop.check()
        info = self._clips.get(data)
        if info is None:
            info = self._clips[data] = self._decoder.probe_video(data, stop=self._stop)
        return info


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
    ) -> None:
        self.config, self.tokenizer, self.image, self.video = config, tokenizer, image, video
        self.template, self.generation = template, generation
        self.decoder = decoder or MediaDecoder()
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
    ) -> Processor:
        """Read tokenizer, template, image and video settings and sampling defaults. CheckpointError says what is wrong.

        `decoder`: for clips, whose headers only a decoder understands. `video_outer_wrapper`: whether a clip keeps
        the pair of start and end that templates write around it, besides those of its frames. The models were made
        without it; transformers 5 has it. `image_resize`: as on the command line; it changes pixels, not prompts.
        """
        problems: list[str] = []
        tokenizer = attempt(problems, lambda: _read_tokenizer(folder, config))
        image = attempt(problems, lambda: ImageProcessor.from_folder(folder, config.vision, resize=image_resize))
        video = attempt(problems, lambda: VideoProcessor.from_folder(folder, config.vision, resize=image_resize))
        # Without a tokenizer, what else is wrong is told with these in place of its own.
        names = STRUCTURAL if tokenizer is None else list(tokenizer.special_ids)
        end = 0 if tokenizer is None else tokenizer.token_id(IM_END)
        template = attempt(problems, lambda: ChatTemplate.from_folder(folder, names))
        generation = attempt(problems, lambda: GenerationDefaults.from_folder(folder, default_eos=end))
        if generation is not None:
            size = config.text.vocab_size
            strange = sorted(i for i in generation.eos_token_ids if not 0 <= i < size)
            reason = f"is not in the vocabulary of {size}"
            problems += [f"generation_config.json: eos_token_id {i} {reason}" for i in strange]
        if problems or tokenizer is None or image is None or template is None or generation is None:
            raise CheckpointError(folder, problems)
        return cls(
            config,
            tokenizer,
            image,
            template,
            generation,
            video=video,
            decoder=decoder,
            video_outer_wrapper=video_outer_wrapper,
        )

    def prepare(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        allow_paths: bool = False,
        add_generation_prompt: bool = True,
        stop: Stop | None = None,
    ) -> Prompt:
        """Check, render, tokenize and expand. InputError names the place of whatever is wrong.

        `messages` in OpenAI chat form; images and videos are data: URIs, and with `allow_paths` also local files or
        bytes. Setting `stop` from another thread ends the look at the media with Stopped, in 0.2 s.
        """
        checked, media = parse_messages(messages, allow_paths=allow_paths)
        headers = _Headers(self.image, self.decoder, stop or Stop())
        plans = [self._plan(entry, headers) for entry in media]
        _check_pixels(plans)
        pieces = self.template.render(checked, tools=tools, add_generation_prompt=add_generation_prompt)
        slots = [piece.text for piece in pieces if piece.is_special and piece.text in _PADS.values()]
        if slots != [_PADS[entry.modality] for entry in media]:
            raise InputError(
                f"the chat template made room for {len(slots)} of {len(media)} images and videos, or in another order",
                param="messages",
            )
        prompt = self._lay_out(list(self._expand(pieces, plans)), plans)
        limit = self.config.text.max_position_embeddings
        if len(prompt.token_ids) >= limit:
            raise InputError(
                f"the prompt has {len(prompt.token_ids)} tokens, the context is {limit}",
                param="messages",
                code="context_length_exceeded",
            )
        return prompt

    def _expand(self, pieces: list[Piece], plans: list[_Plan]) -> Iterator[Piece | _Run]:
        """Placeholders become runs. Each frame of a clip gets its time before it and its own start and end; the
        template's pair around the whole clip stays only with `video_outer_wrapper`."""
        start, end = Piece(VISION_START, True), Piece(VISION_END, True)
        numbers = iter(range(len(plans)))
        for place, piece in enumerate(pieces):
            if piece == Piece(IMAGE_PAD, True):
                yield _Run(next(numbers))
            elif piece == Piece(VIDEO_PAD, True):
                number = next(numbers)
                for time in plans[number].times:
                    yield from (Piece(f"<{time:.1f} seconds>", False), start, _Run(number), end)
            elif self.video_outer_wrapper or not _is_beside_clip(pieces, place):
                yield piece

    def _lay_out(self, parts: list[Piece | _Run], plans: list[_Plan]) -> Prompt:
        """Tokenize; neighbouring text is one string."""
        token_ids: list[int] = []
        runs: list[list[int]] = [[] for _ in plans]
        text = ""
        for part in [*parts, None]:
            if isinstance(part, Piece) and not part.is_special:
                text += part.text
                continue
            token_ids += self.tokenizer.encode(text) if text else []
            text = ""
            if isinstance(part, Piece):
                token_ids.append(self.tokenizer.token_id(part.text))
            elif part is not None:
                plan = plans[part.number]
                runs[part.number].append(len(token_ids))
                token_ids += [self.tokenizer.token_id(_PADS[plan.media.modality])] * plan.run_rows(self.config.vision)
        items = [plan.item(where, self.config.vision) for plan, where in zip(plans, runs, strict=True)]
        return Prompt(token_ids, items, [plan.media.data for plan in plans])

    def _plan(self, entry: Media, headers: _Headers) -> _Plan:
        try:
            if entry.modality == "image":
                info = headers.image(entry.data)
                return _Plan(entry, self.image.grid(info.width, info.height), num_pixels=info.width * info.height)
            return self._plan_clip(entry, headers)
        except DisaggError as error:
            raise error.at(entry.param) from error

    def _plan_clip(self, entry: Media, headers: _Headers) -> _Plan:
        video = self.video
        if video is None:
            raise InputError(f"this checkpoint takes no videos: it has no {VIDEO_FILE}")
        if entry.is_frame_list:
            infos = [headers.image(image) for image in unpack_frames(entry.data)]
            sizes = {(info.width, info.height) for info in infos}
            if len(sizes) > 1:
                raise InputError(f"the frames of a clip must have one size, these have {len(sizes)}")
            frames, fps = list(range(len(infos))), entry.fps or UNKNOWN_FPS
            width, height = sizes.pop()
        else:
            clip = headers.clip(entry.data)
            frames = video.sample(clip.num_frames, clip.fps, sample_fps=entry.fps, count=entry.num_frames)
            fps, width, height = clip.fps, clip.width, clip.height
        times = timestamps(frames, fps, self.config.vision.temporal_patch_size)
        num_pixels = (frames[-1] + 1) * width * height
        return _Plan(entry, video.grid(len(frames), width, height), tuple(frames), tuple(times), num_pixels)


def _check_pixels(plans: list[_Plan]) -> None:
    """InputError if decoding all of a request's media would keep an encode rank from everybody else's for long."""
    for is_file, limit, what in ((False, MAX_STILL_PIXELS, "images and frames"), (True, MAX_FILE_PIXELS, "clips")):
        total = 0
        for plan in plans:
            if is_file == (plan.media.modality == "video" and not plan.media.is_frame_list):
                total += plan.num_pixels
                if total > limit:
                    message = (
                        f"the {what} of this request have {total} pixels to decode up to here, the limit is {limit}"
                    )
                    raise InputError(message, param=plan.media.param, status=413)


def _is_beside_clip(pieces: list[Piece], place: int) -> bool:
    """Whether this is the start or end that the template wrote around a clip's placeholder."""
    clip = Piece(VIDEO_PAD, True)
    if pieces[place] == Piece(VISION_START, True):
        return pieces[place + 1 : place + 2] == [clip]
    return pieces[place] == Piece(VISION_END, True) and place > 0 and pieces[place - 1] == clip


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
