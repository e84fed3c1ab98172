"""What an encode rank computes: bytes -> patches -> rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3vl_disagg.core.errors import TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.disagg.digest import payload_digest
from qwen3vl_disagg.disagg.messages import Grant, Header
from qwen3vl_disagg.model import ModelConfig, Qwen3VLMoeForConditionalGeneration, separate_deepstack
from qwen3vl_disagg.processing import Grid, ImageProcessor, item_positions


@dataclass(frozen=True)
class Pixels:
    """One image ready for the tower: patches `[P, patch_dim]` float32."""

    patches: Tensor
    grid: Grid
    preprocess_ms: float


@dataclass(frozen=True)
class EncodedItem:
    """One item's rows: main `[R, h]`, deepstack `[R, n * h]`, fill_ids `[R]` int32, positions `[R, 3]` int32."""

    main: Tensor
    deepstack: Tensor
    fill_ids: Tensor
    positions: Tensor
    grid: Grid
    preprocess_ms: float
    encode_ms: float

    @property
    def digest(self) -> int:
        """Over embeddings, fill_ids, positions and DeepStack."""
        return payload_digest(self.main, self.fill_ids, self.positions, self.deepstack)

    def header(self, grant: Grant) -> Header:
        """What is about to be sent for `grant`."""
        rows = len(self.main)
        if (grant.row_start, grant.row_stop) != (0, rows) or (grant.deepstack_start, grant.deepstack_stop) != (0, rows):
            raise TransferError(f"grant of rows {grant.row_start}..{grant.row_stop} for an item of {rows}")
        return Header(
            request_id=grant.request_id,
            item=grant.item,
            attempt=grant.attempt,
            total_rows=rows,
            row_start=0,
            row_stop=rows,
            deepstack_start=0,
            deepstack_stop=rows,
            grid=self.grid,
            digest=self.digest,
            preprocess_ms=self.preprocess_ms,
            encode_ms=self.encode_ms,
        )

    def payload(self, grant: Grant) -> list[Tensor]:
        """Contiguous pieces in payload order, cut as the grant says."""
        levels = self.deepstack.shape[1] // self.main.shape[1]
        wanted = [len(self.main), len(self.main) if levels else 0]
        if [sum(grant.row_runs), sum(grant.deepstack_runs)] != wanted:
            raise TransferError(f"grant in runs {grant.row_runs} and {grant.deepstack_runs} for {len(self.main)} rows")
        pieces = [
            piece for buffer in (self.main, self.fill_ids, self.positions) for piece in buffer.split(grant.row_runs)
        ]
        aux = [len(self.main), *self.grid, levels, self.main.shape[1], self.digest, grant.attempt]
        pieces.append(torch.tensor(aux, dtype=torch.int64))
        return pieces + (list(self.deepstack.split(grant.deepstack_runs)) if levels else [])


class EncodeWorker:
    """The vision tower and what feeds it. Stateless between calls; `encode` on one thread at a time."""

    def __init__(
        self, vision_model: Qwen3VLMoeForConditionalGeneration, processor: ImageProcessor, config: ModelConfig
    ) -> None:
        self.model, self.processor, self.config = vision_model, processor, config
        self.device = next(vision_model.parameters()).device

    def preprocess(self, data: bytes, visual: VisualItem) -> Pixels:
        """Decode and cut up. InputError for a damaged image, TransferError if its grid is not the announced one."""
        started = time.monotonic()
        patches, grid = self.processor.pixels(data)
        if grid != tuple(visual.grid):
            raise TransferError(f"the image has grid {grid}, the prompt was laid out for {tuple(visual.grid)}")
        return Pixels(patches, grid, (time.monotonic() - started) * 1e3)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Pixels], visual_token_id: int) -> list[EncodedItem]:
        """Run the tower over several images at once; rows on the CPU or the tower's device, contiguous."""
        started = time.monotonic()
        pixels = torch.cat([entry.patches for entry in batch]).to(self.device)
        features = self.model.get_image_feature(pixels, [entry.grid for entry in batch])
        elapsed_ms = (time.monotonic() - started) * 1e3
        merge_unit = self.config.vision.merge_unit
        num_rows = [t * h * w // merge_unit for t, h, w in (entry.grid for entry in batch)]
        items = []
        for entry, rows in zip(batch, features.split(num_rows), strict=True):
            main, deepstack = separate_deepstack(rows, self.config.text.hidden_size)
            positions = item_positions(entry.grid, self.config.vision.spatial_merge_size).T.contiguous()
            fill_ids = torch.full((len(main),), visual_token_id, dtype=torch.int32)
            items.append(EncodedItem(main, deepstack, fill_ids, positions, entry.grid, entry.preprocess_ms, elapsed_ms))
        return items
