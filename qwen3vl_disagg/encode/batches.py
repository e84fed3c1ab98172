"""How much work an image is for the vision tower, and which images go through it together. Pure.

The linear layers of a tower block take 2 (4 D^2 + 2 D I) FLOPs a patch (D wide, I inside the MLP), attention 4 D FLOPs
for each pair of patches of a frame: a frame of 2 D + I patches costs as much in attention as in all linear layers. So a
frame of p patches costs

    (p + p^2 / (2 D + I)) / merge_unit

in visual tokens, counted as what the linear layers cost for one. Patch embedding and mergers are left out: they are a
few percent. With the published tower of the 30B model (D = 1152, I = 4304) an image of 1024 x 1024 pixels, which is
1,024 tokens, costs 1,659.
"""

from __future__ import annotations

from collections.abc import Iterable

from qwen3vl_disagg.model import VisionConfig
from qwen3vl_disagg.processing import Grid


def tower_cost(grid: Grid, config: VisionConfig) -> float:
    """Visual tokens' worth of work; frames do not attend to one another."""
    frames, height, width = grid
    patches = height * width
    return frames * (patches + patches**2 / (2 * config.hidden_size + config.intermediate_size)) / config.merge_unit


def plan_batch(costs: Iterable[float], budget: float) -> int:
    """How many of those that wait, in their order, go together: as many as fit the budget, at least one.

    Nothing overtakes: [3, 9, 1] with a budget of 5 goes as 3, then 9, then 1.
    """
    count, total = 0, 0.0
    for cost in costs:
        total += cost
        if count and total > budget:
            break
        count += 1
    return count
