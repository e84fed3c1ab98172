"""Three-axis positions (time, height, width) of prompts with images and videos.

Text tokens count up on all axes together. A visual run starts where the text stands; its rows step along height and
width, and the text goes on after the longer side: `max(h, w)` merged rows later, not as many as there are tokens.

Example: 3 text tokens, vision start (position 3), an image of 1 x 4 x 6 patches (merge 2, so 2 x 3 rows): time 4,
height 4 4 4 5 5 5, width 4 5 6 4 5 6; vision end stands at 4 + max(4, 6) / 2 = 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3vl_disagg.core.requests import VisualItem

Grid = tuple[int, int, int]


def item_positions(grid: Grid, merge: int) -> Tensor:
    """Positions `[3, rows]` int32 of an item's rows, from 0, each frame by itself.

    A video's frames stand in the prompt as runs of their own, so time is 0 in each.
    """
    frames, height, width = grid
    rows, cols = height // merge, width // merge
    y = torch.arange(rows, dtype=torch.int32).repeat_interleave(cols)
    x = torch.arange(cols, dtype=torch.int32).repeat(rows)
    return torch.stack((torch.zeros_like(y), y, x)).repeat(1, frames)


def mrope_positions(num_tokens: int, items: Sequence[VisualItem], merge: int) -> tuple[Tensor, int]:
    """Positions `[3, num_tokens]` int64, and delta: the token at index n after the prompt has position n + delta.

    `items` in prompt order, images only: a video's runs are separated by timestamps. ValueError if they overlap, stand
    outside the prompt or have another number of rows than their grid.
    """
    parts: list[Tensor] = []
    index = current = 0
    for item in items:
        frames, height, width = item.grid
        if item.num_rows != frames * height * width // merge**2:
            raise ValueError(f"grid {item.grid} has {frames * height * width // merge**2} rows, not {item.num_rows}")
        if item.modality != "image" or frames != 1:
            raise ValueError(f"positions of a {item.modality} with {frames} frames are not built yet")
        if item.offset < index or item.offset + item.num_rows > num_tokens:
            raise ValueError(
                f"item at {item.offset} with {item.num_rows} rows does not fit a prompt of {num_tokens} tokens"
            )
        num_text = item.offset - index
        parts.append(torch.arange(current, current + num_text).expand(3, -1))
        current += num_text
        parts.append(item_positions(item.grid, merge).long() + current)
        current += max(height, width) // merge
        index = item.offset + item.num_rows
    parts.append(torch.arange(current, current + num_tokens - index).expand(3, -1))
    positions = torch.cat(parts, dim=1)
    return positions, int(positions.max()) + 1 - num_tokens if num_tokens else 0
