"""Items as an encode rank would make them, without a tower."""

from __future__ import annotations

import torch

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.disagg.encode_worker import EncodedItem
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import Grid, item_positions


def make_visual(config: ModelConfig, grid: Grid = (1, 4, 6)) -> VisualItem:
    rows = grid[0] * grid[1] * grid[2] // config.vision.merge_unit
    return VisualItem(
        modality="image", digest="0" * 64, num_bytes=1, grid=grid, num_rows=rows, offset=0, param="messages[0]"
    )


def make_encoded(config: ModelConfig, grid: Grid = (1, 4, 6), *, seed: int = 0) -> EncodedItem:
    """Random rows of the right shapes; fill_ids and positions as they have to be."""
    generator = torch.Generator().manual_seed(seed)
    rows, hidden = make_visual(config, grid).num_rows, config.text.hidden_size
    return EncodedItem(
        main=torch.randn(rows, hidden, generator=generator),
        deepstack=torch.randn(rows, config.num_deepstack_levels * hidden, generator=generator),
        fill_ids=torch.full((rows,), config.image_token_id, dtype=torch.int32),
        positions=item_positions(grid, config.vision.spatial_merge_size).T.contiguous(),
        grid=grid,
        preprocess_ms=1.0,
        encode_ms=2.0,
    )
