"""What an image costs in the tower, and which go through it together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen3vl_disagg.encode.batches import plan_batch, tower_cost
from tests.support.random_model import random_vision_model, small_config

CONFIG = small_config().vision
MODEL = random_vision_model(small_config(), seed=1)


def count_flops(grid: tuple[int, int, int]) -> int:
    """Of the tower's blocks."""
    pixels = torch.zeros(grid[0] * grid[1] * grid[2], CONFIG.patch_dim)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        MODEL.visual(pixels, [grid])
    counts = counter.get_flop_counts()
    return sum(sum(counts[f"VisionTower.blocks.{block}"].values()) for block in range(CONFIG.depth))


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 6), (1, 16, 16), (1, 2, 32), (4, 4, 6), (3, 8, 8)])
def test_the_cost_of_an_image_is_that_of_its_flops(grid):
    width, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    token = CONFIG.depth * CONFIG.merge_unit * (8 * width**2 + 4 * width * inner)
    assert count_flops(grid) == pytest.approx(token * tower_cost(grid, CONFIG))


def test_attention_counts_by_the_square_and_frames_do_not_see_each_other():
    assert tower_cost((1, 32, 32), CONFIG) > 3 * tower_cost((1, 16, 32), CONFIG)
    assert tower_cost((4, 16, 16), CONFIG) == 4 * tower_cost((1, 16, 16), CONFIG)


@pytest.mark.parametrize(
    ("costs", "budget", "count"),
    [([], 5, 0), ([3, 9, 1], 5, 1), ([9, 1], 5, 1), ([1, 4, 1], 5, 2), ([1, 1, 1], 0, 1), ([2, 2, 2], 100, 3)],
)
def test_as_many_as_fit_at_least_one_nothing_overtakes(costs, budget, count):
    assert plan_batch(costs, budget) == count


@given(costs=st.lists(st.floats(0.1, 50), max_size=30), budget=st.floats(0, 100))
def test_all_go_in_their_order_in_batches_that_could_not_be_longer(costs, budget):
    start = 0
    while start < len(costs):
        count = plan_batch(iter(costs[start:]), budget)
        assert count >= 1
        assert count == 1 or sum(costs[start : start + count]) <= budget
        if start + count < len(costs):
            assert sum(costs[start : start + count + 1]) > budget
        start += count
    assert start == len(costs)
