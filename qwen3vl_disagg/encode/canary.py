"""Before an encode rank says hello: a picture goes through its pipeline, twice, and the rows have to be those that the
checkpoint's own tower, read from the files once more, makes of it.

CanaryFailed names the part that differs: `preprocessing`, `cache`, `vision tower`, `main rows`, `DeepStack level i`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen3vl_disagg.checkpoint.reference import Reference
from qwen3vl_disagg.core.closeness import Closeness
from qwen3vl_disagg.core.errors import CanaryFailed
from qwen3vl_disagg.core.faults import no_faults
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.embedding_cache import HeldItem
from qwen3vl_disagg.encode.link_canary import CheckedRows
from qwen3vl_disagg.encode.pipeline import EncodePipeline
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.protocol.canary import SIZE, canary_names

WAIT_S = 120.0
GPU_PATCHES = 1e-5
"""How far patches that a GPU normalised may be from those of the host: a level is some thousandths."""


def picture() -> bytes:
    """A PNG, the same each time: soft blots, so that each patch is another one, and resizing has something to do."""
    width, height = SIZE
    coarse = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(data, "PNG")
    return data.getvalue()


def picture_item(worker: EncodeWorker, data: bytes) -> VisualItem:
    """The picture as an item of a prompt."""
    (width, height), vision = SIZE, worker.config.vision
    grid = worker.processor.grid(width, height)
    return VisualItem(
        modality="image",
        digest=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        grid=grid,
        num_rows=math.prod(grid) // vision.merge_unit,
        offset=0,
        param="canary",
        size=(height, width),
    )


def check_tower(worker: EncodeWorker, folder: Path) -> CheckedRows:
    """The picture's rows, which are right. CanaryFailed if not; other errors say that it could not be seen."""
    data = picture()
    visual = picture_item(worker, data)
    patches = _same_patches(worker, data, visual)
    with no_faults():
        first, second = asyncio.run(_through_pipeline(worker, data, visual))
    if not second.is_cached or second.item is not first.item:
        raise CanaryFailed("cache", "the same picture again was not found there")
    _check_rows(worker, folder, patches, visual, first.item)
    return CheckedRows(visual, first.item)


def _same_patches(worker: EncodeWorker, data: bytes, visual: VisualItem) -> Tensor:
    """As the rank cuts them up, which has to be as this process does by itself."""
    own = ImageProcessor(worker.config.vision, worker.processor.bounds, resize=worker.processor.resize)
    expected, _ = own.pixels(data, visual)
    found = worker.patches([worker.preprocess(data, visual)]).cpu()
    bound = 0.0 if worker.device.type == "cpu" else GPU_PATCHES
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.0, atol=bound):
        raise CanaryFailed("preprocessing", "a decoding child gave other patches than this process")
    return expected


async def _through_pipeline(worker: EncodeWorker, data: bytes, visual: VisualItem) -> tuple[HeldItem, HeldItem]:
    async def pull(digest: str, num_bytes: int) -> bytes:
        return data

    pipeline = EncodePipeline(worker, pull, EncodeOptions(), tower=_Here())
    try:
        async with asyncio.timeout(WAIT_S):
            return await pipeline.rows(visual, _ignore), await pipeline.rows(visual, _ignore)
    finally:
        pipeline.close()
        pipeline.join()


def _ignore() -> None:
    return None


class _Here(Executor):
    """Runs what it is given at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@torch.inference_mode()
def _check_rows(worker: EncodeWorker, folder: Path, patches: Tensor, visual: VisualItem, item: EncodedItem) -> None:
    build = partial(Qwen3VLMoeForConditionalGeneration, language_model=False)
    close = Closeness.of(item.main.dtype, depth=worker.config.vision.depth)
    with Reference(build, folder, worker.model) as reference:
        main, levels = reference.in_parts("visual")(patches, [visual.grid])
    if reference.differing:
        raise CanaryFailed("vision tower", f"{reference.differing[0]} is not as in the checkpoint's files")
    expected = dict(zip(canary_names(len(levels)), [main, *levels], strict=True))
    got = dict(zip(expected, [item.main, *item.deepstack.split(main.shape[1], dim=1)], strict=False))
    wrong = [name for name, rows in expected.items() if name not in got or not close.is_close(got[name], rows)]
    if not wrong:
        return
    others = [other for other, rows in expected.items() if wrong[0] in got and close.is_close(got[wrong[0]], rows)]
    if others:
        raise CanaryFailed(wrong[0], f"they are {others[0]}")
    part = "vision tower" if wrong[0] == "main rows" and len(wrong) > 1 else wrong[0]
    raise CanaryFailed(part, "its weights are as in the files, but rows are not what the checkpoint's own tower gives")
