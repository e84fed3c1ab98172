"""The room for keys and values on this rank, from the memory that is there."""

from __future__ import annotations

import logging

import torch

from qwen3vl_disagg.core.host_memory import available_bytes
from qwen3vl_disagg.core.settings import EngineSettings
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.kv_room import KvRoom, kv_room
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.processing import ImageProcessor

logger = logging.getLogger(__name__)


def free_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a card; (available, 0) of the host."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    return available_bytes(), 0


def measured_room(
    config: ModelConfig,
    settings: EngineSettings,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_language: int = 1,
    image_rows: int = 0,
) -> KvRoom:
    """From what is free now, with the weights loaded and nobody else to share it with. See `kv_room`."""
    model = SizedModel(config, dtype.itemsize, is_cuda=device.type == "cuda")
    free, total = free_memory(device)
    shares = {"num_language": num_language, "image_rows": image_rows}
    return kv_room(model, settings, free_bytes=free, total_bytes=total, **shares)


def warn_of_images(processor: ImageProcessor, room: KvRoom) -> None:
    """Say so where a request with the largest image that the processor makes would be refused."""
    problem = room.why_not(processor.max_rows)
    if problem is not None:
        made = f"images of up to {processor.max_rows:,} visual tokens are made"
        logger.warning("warning: %s, and the largest do not fit: %s", made, problem)
