"""Messages -> prompt: token ids with placeholders expanded, and the visual items that fill them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.processing.generation import GenerationDefaults
from qwen3vl_disagg.processing.images import ImageProcessor
from qwen3vl_disagg.processing.media_parts import Media
from qwen3vl_disagg.processing.messages import parse_messages
from qwen3vl_disagg.processing.template import ChatTemplate
from qwen3vl_disagg.processing.tokenizer import (
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Tokenizer,
)


@dataclass(frozen=True)
class Prompt:
    """What a request asks: ids with expanded placeholders, and for each visual item its header facts and bytes."""

    token_ids: list[int]
    items: list[VisualItem]
    media: list[bytes]


class Processor:
    """Everything between a caller's messages and token ids. Pixels are not touched: headers give exact row counts."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        image: ImageProcessor,
        template: ChatTemplate,
        generation: GenerationDefaults,
    ) -> None:
        self.config, self.tokenizer, self.image = config, tokenizer, image
        self.template, self.generation = template, generation

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> Processor:
        """Read tokenizer, template, image settings and sampling defaults. CheckpointError says what is wrong."""
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
        return cls(
            config,
            tokenizer,
            ImageProcessor.from_folder(folder, config.vision),
            ChatTemplate.from_folder(folder, list(tokenizer.special_ids)),
            GenerationDefaults.from_folder(folder, default_eos=tokenizer.token_id(IM_END)),
        )

    def prepare(
        self, messages: list[dict[str, Any]], *, allow_paths: bool = False, add_generation_prompt: bool = True
    ) -> Prompt:
        """Check, render, tokenize and expand. InputError names the place of whatever is wrong.

        `messages` in OpenAI chat form; images are data: URIs, and with `allow_paths` also local files or bytes.
        """
        checked, media = parse_messages(messages, allow_paths=allow_paths)
        grids = [self._grid(entry) for entry in media]
        pieces = self.template.render(checked, add_generation_prompt=add_generation_prompt)
        num_slots = sum(piece.is_special and piece.text == IMAGE_PAD for piece in pieces)
        if num_slots != len(media):
            raise InputError(f"the chat template made room for {num_slots} of {len(media)} images", param="messages")
        token_ids: list[int] = []
        items: list[VisualItem] = []
        for text, is_special in pieces:
            if not is_special:
                token_ids += self.tokenizer.encode(text)
                continue
            token_id = self.tokenizer.token_id(text)
            if token_id != self.config.image_token_id:
                token_ids.append(token_id)
                continue
            entry, grid = media[len(items)], grids[len(items)]
            num_rows = grid[0] * grid[1] * grid[2] // self.config.vision.merge_unit
            item = VisualItem(
                modality="image",
                digest=hashlib.sha256(entry.data).hexdigest(),
                num_bytes=len(entry.data),
                grid=grid,
                num_rows=num_rows,
                offset=len(token_ids),
                param=entry.param,
            )
            items.append(item)
            token_ids += [token_id] * num_rows
        limit = self.config.text.max_position_embeddings
        if len(token_ids) >= limit:
            raise InputError(
                f"the prompt has {len(token_ids)} tokens, the context is {limit}",
                param="messages",
                code="context_length_exceeded",
            )
        return Prompt(token_ids, items, [entry.data for entry in media])

    def _grid(self, entry: Media) -> tuple[int, int, int]:
        try:
            info = self.image.probe(entry.data)
            return self.image.grid(info.width, info.height)
        except InputError as error:
            raise error.at(entry.param) from error
