"""How much room keys and values get. One rule, for what serves and for what is planned.

    auto, CUDA   free memory - a tenth of the card - a step
    auto, CPU    half of the free memory, divided by the language ranks of the host, - a step
    never        more than the longest context for each of the requests that run at once

Free: with the weights in place. Step: activations of the longest prefill, on CUDA what captured decode steps keep, and
room for visual rows (an estimate, `SizedModel`). On a CPU memory is taken when it is first written, so a server that
is asked little takes little.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from qwen3vl_disagg.core.host import available_bytes
from qwen3vl_disagg.core.settings import EngineSettings
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.parallel.sizes import SizedModel

logger = logging.getLogger(__name__)

CARD_RESERVE, HOST_SHARE = 0.1, 0.5
TEXT_TOKENS = 64
"""Beside an image: the template and a short question."""
_GIB = 2**30


@dataclass(frozen=True)
class KvRoom:
    """Pages of one language rank."""

    num_pages: int
    page_size: int
    token_bytes: int
    context: int
    """The model's longest."""

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.token_bytes

    def requests_of(self, tokens: int) -> int:
        """How many requests of that many tokens fit at once."""
        return self.num_pages // -(-tokens // self.page_size)

    def __str__(self) -> str:
        pages = f"{self.num_pages:,} pages of {self.page_size}"
        return f"{self.num_tokens:,} tokens of keys and values ({pages}, {self.num_bytes / _GIB:.2f} GiB)"

    def why_not(self, image_rows: int) -> str | None:
        """Why a request with one image of that many rows could not run; None if it could."""
        needed = image_rows + TEXT_TOKENS
        if needed > self.context:
            return f"the model's context is {self.context:,} tokens"
        if needed > self.num_tokens:
            gib = -(-needed // self.page_size) * self.page_size * self.token_bytes / _GIB
            return f"there is room for {self.num_tokens:,} tokens: --kv-cache-gib {gib:.2f} would be enough"
        return None

    def warn_of_images(self, max_rows: int) -> None:
        """Say so where a request with the largest image that the processor makes, of `max_rows`, would be refused."""
        problem = self.why_not(max_rows)
        if problem is not None:
            made = f"images of up to {max_rows:,} visual tokens are made"
            logger.warning("warning: %s, and the largest do not fit: %s", made, problem)


def kv_room(
    model: SizedModel,
    settings: EngineSettings,
    *,
    free_bytes: float,
    total_bytes: float = 0.0,
    num_language: int = 1,
    num_sharers: int = 1,
    image_rows: int = 0,
) -> KvRoom:
    """Of one language rank; at least a page.

    Args:
        free_bytes: of the card or the host, with all weights in place.
        total_bytes: of the card.
        num_language: ranks that step together; `num_sharers`: language ranks that share the host's memory.
        image_rows: of the largest image, where the rank encodes too; 0 where it does not.
    """
    text, token_bytes = model.config.text, model.kv_token_bytes()
    if settings.kv_cache_gib != "auto":
        budget = settings.kv_cache_gib * _GIB
    else:
        parts = model.language_memory(num_language, settings.max_running, 0, settings.max_prefill_tokens)
        step = parts["room for visual rows"] + parts["activations"]
        step += model.captured_bytes(settings.max_running, num_language)
        if image_rows:
            encode = model.encode_memory(image_rows)
            step += encode["cache of rows"] + encode["activations"]
        share = free_bytes - CARD_RESERVE * total_bytes if model.is_cuda else HOST_SHARE * free_bytes / num_sharers
        budget = share - step
    size = settings.tokens_in_page(is_cuda=model.is_cuda)
    affordable = int(max(0.0, budget)) // (token_bytes * size)
    useful = settings.max_running * -(-text.max_position_embeddings // size)
    return KvRoom(max(1, min(affordable, useful)), size, token_bytes, text.max_position_embeddings)


def measured_room(
    config: ModelConfig,
    settings: EngineSettings,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_language: int = 1,
    image_rows: int = 0,
) -> KvRoom:
    """From what is free now, with the weights loaded and no other rank to share it with. See `kv_room`."""
    model = SizedModel(config, dtype.itemsize, is_cuda=device.type == "cuda")
    free, total = torch.cuda.mem_get_info(device) if model.is_cuda else (available_bytes(), 0)
    shares = {"num_language": num_language, "image_rows": image_rows}
    return kv_room(model, settings, free_bytes=free, total_bytes=total, **shares)


def planned_room(
    model: SizedModel,
    settings: EngineSettings,
    rank: int,
    *,
    free_bytes: float,
    total_bytes: float = 0.0,
    encode: range,
    language: range,
    beside: range,
    image_rows: int = 0,
) -> KvRoom:
    """Of a language rank, from what was free before any weights were loaded. See `kv_room`.

    Args:
        encode, language: the ranks of each role; `beside`: those that share the memory, `rank` among them.
        image_rows: of the largest image; it counts where the rank encodes too.
    """
    return kv_room(
        model,
        settings,
        free_bytes=free_bytes - weights_on_host(model, language, encode, beside),
        total_bytes=total_bytes,
        num_language=len(language),
        num_sharers=sum(other in language for other in beside),
        image_rows=image_rows if rank in encode else 0,
    )


def weights_on_host(model: SizedModel, language: range, encode: range, host: range) -> float:
    """Bytes of the weights of the ranks `host`, by which roles they have."""
    generating = [rank for rank in host if rank in language]
    experts = model.num_experts_of(len(language))
    held = model.experts_bytes(sum(experts[rank - language.start] for rank in generating))
    towers = model.tower_bytes() * sum(rank in encode for rank in host)
    return held + model.replicated_bytes() * len(generating) + towers
