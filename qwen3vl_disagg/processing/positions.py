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

    `items` in prompt order. A frame of a video is placed as an image is: its run stands by itself, behind its
    timestamp, which is what tells the time. ValueError if items overlap, stand outside the prompt or have another
    number of rows or runs than their grid.
    """
    parts: list[Tensor] = []
    index = current = 0
    for item in items:
        frames, height, width = item.grid
        if item.num_rows != frames * height * width // merge**2:
            raise ValueError(f"grid {item.grid} has {frames * height * width // merge**2} rows, not {item.num_rows}")
        if len(item.runs) != frames or item.runs[0] != item.offset:
            raise ValueError(f"{item.modality} of {frames} frames at {item.offset} with runs at {item.runs}")
        frame = item_positions((1, height, width), merge).long()
        for start in item.runs:
            if start < index or start + item.run_rows > num_tokens:
                raise ValueError(
                    f"item at {start} with {item.run_rows} rows does not fit a prompt of {num_tokens} tokens"
                )
            num_text = start - index
            parts.append(torch.arange(current, current + num_text).expand(3, -1))
            current += num_text
            parts.append(frame + current)
            current += max(height, width) // merge
            index = start + item.run_rows
    parts.append(torch.arange(current, current + num_tokens - index).expand(3, -1))
    positions = torch.cat(parts, dim=1)
    return positions, int(positions.max()) + 1 - num_tokens if num_tokens else 0
