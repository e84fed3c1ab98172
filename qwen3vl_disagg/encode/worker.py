"""What an encode rank computes: bytes -> patches -> rows, in memory of the host."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qwen3vl_disagg.cluster.shared_cores import SharedCores
from qwen3vl_disagg.core.copies import Downloads
from qwen3vl_disagg.core.devices import raise_if_lost, use_device
from qwen3vl_disagg.core.errors import (
    ENCODE_ERROR,
    DisaggError,
    InputError,
    ServerError,
    TransferError,
    UnavailableError,
)
from qwen3vl_disagg.core.host import keep_freed_memory
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.tensors import are_finite, uploaded
from qwen3vl_disagg.encode.batches import tower_cost
from qwen3vl_disagg.encode.shared_gpu import SharedGpu
from qwen3vl_disagg.kernels.compiling import GraphCounts, compile_options, first_alone
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.model import ModelConfig, Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.model.vision import VisionTower
from qwen3vl_disagg.processing import Grid, ImageProcessor, VideoProcessor, item_positions
from qwen3vl_disagg.processing.patches import Frames
from qwen3vl_disagg.protocol.layout import item_ranges
from qwen3vl_disagg.protocol.messages import Header, Resume, Room
from qwen3vl_disagg.transport.digest import add_digests, deepstack_sums, range_digests, run_sums, sums_digest

logger = logging.getLogger(__name__)
MAX_NOTE = 500


@dataclass(frozen=True)
class Pixels:
    """One image or clip ready for the tower: patches `[P, patch_dim]` float32, or frames that a GPU cuts up."""

    patches: Tensor | Frames
    grid: Grid
    preprocess_ms: float
    note: str = ""
    """What of the file is missing."""


@dataclass(frozen=True)
class EncodedItem:
    """One item's rows: main `[R, h]`, deepstack `[R, n * h]`, fill_ids `[R]` int32, positions `[R, 3]` int32.

    `sums` and `deepstack_sums` `[R]`: of each row's bytes, for the digests of whatever runs are asked for.
    """

    main: Tensor
    deepstack: Tensor
    fill_ids: Tensor
    positions: Tensor
    grid: Grid
    preprocess_ms: float
    encode_ms: float
    note: str = ""

    @cached_property
    def sums(self) -> Tensor:
        return run_sums(self.main, self.fill_ids, self.positions)

    @cached_property
    def deepstack_sums(self) -> Tensor:
        return deepstack_sums(self.deepstack)

    @cached_property
    def digest(self) -> int:
        """Of the whole item: what the digests of all its runs add up to."""
        return add_digests(sums_digest(self.sums), sums_digest(self.deepstack_sums))

    @property
    def num_bytes(self) -> int:
        """Of all the tensors it holds."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def header(self, grant: Room) -> Header:
        """What is about to be sent for `grant`. TransferError if this item cannot fill it."""
        total = len(self.main)
        rows, deepstack = self._ranges(grant)
        for name, ranges, start, stop in (
            ("rows", rows, grant.row_start, grant.row_stop),
            ("DeepStack rows", deepstack, grant.deepstack_start, grant.deepstack_stop),
        ):
            end = ranges[-1][1] if ranges else start
            if not 0 <= start <= end == stop <= total or min(b - a for a, b in [*ranges, (0, 1)]) < 1:
                raise TransferError(f"{name} {start}..{stop} in runs {ranges} of an item of {total}")
        if not rows:
            raise TransferError(f"a grant of no rows of an item of {total}")
        return Header(
            request_id=grant.request_id,
            item=grant.item,
            attempt=grant.attempt,
            total_rows=total,
            row_start=grant.row_start,
            row_stop=grant.row_stop,
            deepstack_start=grant.deepstack_start,
            deepstack_stop=grant.deepstack_stop,
            grid=self.grid,
            row_digests=range_digests(self.sums, rows),
            deepstack_digests=range_digests(self.deepstack_sums, deepstack),
            preprocess_ms=self.preprocess_ms,
            encode_ms=self.encode_ms,
            note=self.note,
        )

    def payload(self, grant: Room) -> list[Tensor]:
        """Contiguous views in payload order, cut as the grant says; no copies."""
        rows, deepstack = self._ranges(grant)
        pieces = [] if isinstance(grant, Resume) else [self._aux(grant.attempt)]
        pieces += [self.deepstack[start:stop] for start, stop in deepstack]
        for start, stop in rows:
            pieces += [self.main[start:stop], self.fill_ids[start:stop], self.positions[start:stop]]
        return pieces

    @staticmethod
    def _ranges(grant: Room) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        rows = list(item_ranges(grant.row_runs, grant.row_start))
        return rows, list(item_ranges(grant.deepstack_runs, grant.deepstack_start))

    def _aux(self, attempt: int) -> Tensor:
        """`[len(AUX_FIELDS)]` int64"""
        levels = self.deepstack.shape[1] // self.main.shape[1]
        return torch.tensor([len(self.main), *self.grid, levels, self.main.shape[1], self.digest, attempt])


@dataclass(frozen=True)
class LeavingItem:
    """An item whose rows are on their way from the GPU to the host. `is_finite`: `[]` bool, comes with them."""

    item: EncodedItem
    is_finite: Tensor
    event: torch.cuda.Event

    def arrived(self) -> EncodedItem | Exception:
        """When they are here; blocks."""
        self.event.synchronize()
        return self.item if bool(self.is_finite) else _not_finite()


def _not_finite() -> ServerError:
    return ServerError("the vision tower's rows hold NaN or infinity", code=ENCODE_ERROR)


EncodeResult = EncodedItem | LeavingItem | Exception


class EncodeWorker:
    """The vision tower and what feeds it. Stateless; `encode` on one thread at a time."""

    def __init__(
        self,
        vision_model: Qwen3VLMoeForConditionalGeneration,
        processor: ImageProcessor,
        config: ModelConfig,
        *,
        video: VideoProcessor | None = None,
        decoder: MediaDecoder | None = None,
        compile: bool = False,
        cores: SharedCores | None = None,
    ) -> None:
        """`decoder`: where bytes are decoded; without it images are in this process, and there are no videos. `cores`:
        those of the host, claimed before each block of the tower."""
        self.model, self.processor, self.config = vision_model, processor, config
        self.video, self.decoder = video, decoder
        self.device = next(vision_model.parameters()).device
        self._cores = cores
        self._downloads = Downloads(self.device) if self.device.type == "cuda" else None
        self._gpu: SharedGpu | None = None
        self._block_cost = 0.0
        if self.device.type == "cpu":
            keep_freed_memory()
        if compile:
            compile_tower(vision_model.visual)
        if cores is not None:
            vision_model.visual.before_block = cores.claim

    def share(self, gpu: SharedGpu) -> None:
        """With a decoder of this process: see `SharedGpu`."""
        self._gpu = gpu
        self.model.visual.before_block = lambda: gpu.turns.before(self._block_cost)

    def preprocess(self, data: bytes, visual: VisualItem, stop: StopSignal | None = None) -> Pixels:
        """Decode and cut up. InputError for damaged media, MediaTimeout for what takes too long, ServerError if the
        size or the grid is not the announced one, Stopped soon after `stop` is set."""
        started, notes = time.monotonic(), list[str]()
        is_cuda = self.device.type == "cuda"
        patches: Tensor | Frames
        if visual.modality == "image":
            of_image = self.processor.frames if is_cuda else self.processor.pixels
            patches, grid = of_image(data, visual, self.decoder, stop, notes)
        elif self.video is not None and self.decoder is not None:
            of_clip = self.video.frames if is_cuda else self.video.pixels
            patches, grid = of_clip(data, visual, self.decoder, stop, notes)
        else:
            raise UnavailableError("this encode rank takes no videos")
        if grid != tuple(visual.grid):
            message = f"the item has grid {grid}, the prompt was laid out for {tuple(visual.grid)}"
            raise ServerError(message, code=ENCODE_ERROR)
        note = "; ".join(dict.fromkeys(notes))[:MAX_NOTE]
        return Pixels(patches, grid, (time.monotonic() - started) * 1e3, note)

    def patches(self, batch: Sequence[Pixels]) -> Tensor:
        """Those of all, `[P, patch_dim]` float32 on the tower's device. One upload; of frames as the bytes that they
        are: an eighth of what patches of an image would be, a quarter of those of a clip."""
        sources = [entry.patches for entry in batch]
        whole = [x for x in sources if isinstance(x, Tensor)]
        if len(whole) == len(sources):
            return uploaded(torch.cat(whole), self.device)
        frames = [x for x in sources if isinstance(x, Frames)]
        levels = uploaded(torch.cat([x.levels.flatten() for x in frames]), self.device)
        parts = levels.split([x.levels.numel() for x in frames])
        return torch.cat(
            [
                x.patches(part.view(x.levels.shape), entry.grid, self.config.vision)
                for x, part, entry in zip(frames, parts, batch, strict=True)
            ]
        )

    def encode(self, batch: Sequence[Pixels], visual_token_ids: Sequence[int]) -> list[EncodeResult]:
        """Run the tower over several images and clips at once; rows contiguous, each item's in memory of its own.
        `encode_ms` is the time of the whole batch. From a GPU the rows are on their way when this returns.

        What goes wrong with an item stands in its place: ServerError for rows that are not finite. When the tower
        fails over several (they may not fit in memory together), each goes through it alone. DeviceLost if there is no
        more device to try on.
        """
        if not batch:
            return []
        try:
            if self._gpu is None:
                return self._encode_together(batch, visual_token_ids)
            with self._gpu.tower():
                self._block_cost = sum(tower_cost(entry.grid, self.config.vision) for entry in batch)
                return self._encode_together(batch, visual_token_ids)
        except Exception as error:
            raise_if_lost(error)
            if len(batch) == 1:
                return [error]
        finally:
            if self._cores is not None:
                self._cores.release()
        return [
            result
            for entry, token_id in zip(batch, visual_token_ids, strict=True)
            for result in EncodeWorker.encode(self, [entry], [token_id])
        ]

    @torch.inference_mode()
    def _encode_together(self, batch: Sequence[Pixels], visual_token_ids: Sequence[int]) -> list[EncodeResult]:
        started = time.monotonic()
        use_device(self.device)
        main, levels = self.model.visual(self.patches(batch), [entry.grid for entry in batch])
        deepstack = torch.cat([main[:, :0], *levels], dim=-1)
        merge_unit = self.config.vision.merge_unit
        num_rows = [t * h * w // merge_unit for t, h, w in (entry.grid for entry in batch)]
        parts = list(zip(main.split(num_rows), deepstack.split(num_rows), strict=True))
        if self._downloads is not None:
            return self._leave(self._downloads, batch, visual_token_ids, parts, started)
        is_good = are_finite(parts)
        elapsed_ms = (time.monotonic() - started) * 1e3
        return [
            self._item(entry, token_id, _own(main), _own(deepstack), elapsed_ms) if ok else _not_finite()
            for entry, token_id, (main, deepstack), ok in zip(batch, visual_token_ids, parts, is_good, strict=True)
        ]

    def _leave(
        self,
        downloads: Downloads,
        batch: Sequence[Pixels],
        visual_token_ids: Sequence[int],
        parts: Sequence[tuple[Tensor, Tensor]],
        started: float,
    ) -> list[EncodeResult]:
        """Send the rows on their way, and wait for the tower alone."""
        is_finite_B = torch.stack([main.isfinite().all() & deepstack.isfinite().all() for main, deepstack in parts])
        computed = torch.cuda.current_stream(self.device).record_event()
        (is_finite_B, *rows), copied = downloads.start([is_finite_B, *(rows for part in parts for rows in part)])
        computed.synchronize()
        elapsed_ms = (time.monotonic() - started) * 1e3
        return [
            LeavingItem(self._item(entry, token_id, main, deepstack, elapsed_ms), is_finite, copied)
            for entry, token_id, main, deepstack, is_finite in zip(
                batch, visual_token_ids, rows[::2], rows[1::2], is_finite_B, strict=True
            )
        ]

    def _item(self, entry: Pixels, token_id: int, main: Tensor, deepstack: Tensor, elapsed_ms: float) -> EncodedItem:
        positions = item_positions(entry.grid, self.config.vision.spatial_merge_size).T.contiguous()
        fill_ids = torch.full((len(main),), token_id, dtype=torch.int32)
        return EncodedItem(
            main, deepstack, fill_ids, positions, entry.grid, entry.preprocess_ms, elapsed_ms, entry.note
        )


@torch.inference_mode()
def compile_tower(tower: VisionTower) -> GraphCounts:
    """Compile the tower's block in place, and run it once: one graph serves every block, number and size of images."""
    before = GraphCounts.now()
    tower.step = torch.compile(  # type: ignore[method-assign]
        tower.step, fullgraph=True, dynamic=True, options=compile_options()
    )
    merge, weight = tower.config.spatial_merge_size, tower.patch_embed.proj.weight
    grids = [(1, 3 * merge, 2 * merge), (1, merge, merge)]
    pixels = torch.zeros(sum(h * w for _, h, w in grids), tower.config.patch_dim, device=weight.device)
    with first_alone(f"tower {tower.config} {weight.dtype} {weight.device}"):
        tower(pixels, grids)
    return GraphCounts.now().since(before)


def encode_error(error: Exception) -> DisaggError:
    """What an item's failure is to others. The cause of one that was not raised on purpose goes to the log."""
    if isinstance(error, InputError) and error.code == "not_installed":
        # What this rank lacks is not the client's fault, and another rank may have it.
        return UnavailableError(error.message)
    if isinstance(error, DisaggError):
        return error
    logger.error("an image or clip could not be encoded", exc_info=error)
    return ServerError("an image or clip could not be encoded", code=ENCODE_ERROR)


def _own(rows: Tensor) -> Tensor:
    """Not a piece of a whole batch's memory, which would live as long as the piece: one row is, or all columns."""
    return rows if rows.untyped_storage().nbytes() == rows.nbytes else rows.clone()
