"""Rotary embeddings and patch order against worked examples."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.model.config import YarnScaling, check_config
from qwen3vl_disagg.model.rope import (
    apply_rotary,
    inverse_frequencies,
    mrope_axes,
    text_rotary,
    vision_rotary,
    yarn_bounds,
)
from qwen3vl_disagg.model.vision import patch_coordinates
from tests.support.oracle import CONFIGS


def test_axes_of_the_published_models():
    assert mrope_axes(64, (24, 20, 20)) == [0, 1, 2] * 20 + [0] * 4


def test_axes_of_small_heads():
    assert mrope_axes(16, (6, 5, 5)) == [0, 1, 2] * 5 + [0]
    assert mrope_axes(12, (4, 4, 4)) == [0, 1, 2] * 4


@given(section=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)))
def test_a_section_that_the_config_accepts_gets_its_numbers_of_frequencies(section):
    half = sum(section)
    text = replace(CONFIGS["moe"].text, head_dim=2 * half, mrope_section=section)
    accepted = not check_config(replace(CONFIGS["moe"], text=text))
    axes = mrope_axes(half, section)
    assert accepted == ([axes.count(axis) for axis in range(3)] == list(section))


def test_text_angles():
    positions = torch.tensor([[3, 7], [3, 9], [3, 8]])
    cos, sin = text_rotary(positions, head_dim=12, theta=100.0, section=(2, 2, 2), dtype=torch.float32)
    assert cos.shape == sin.shape == (2, 1, 12)
    frequencies = [100.0 ** (-2 * j / 12) for j in range(6)]
    for token, axes in enumerate([[3] * 6, [7, 9, 8, 7, 9, 8]]):
        angles = torch.tensor([axis * frequency for axis, frequency in zip(axes, frequencies, strict=True)] * 2)
        torch.testing.assert_close(cos[token, 0], angles.cos())
        torch.testing.assert_close(sin[token, 0], angles.sin())


def test_angles_are_float32_whatever_the_model_is():
    positions = torch.full((3, 1), 10_001)
    settings = {"head_dim": 128, "theta": 5e6, "section": (24, 20, 20)}
    exact, _ = text_rotary(positions, **settings, dtype=torch.float32)
    rounded, _ = text_rotary(positions, **settings, dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    # theta 4 and 8 frequencies: j turns 2^10 / 2^(j / 4) times, so 2^9.5 turns is j = 2 and 2^8.75 is j = 5.
    sizes = {"factor": 4.0, "original_max_position_embeddings": round(2**10 * 2 * torch.pi), "attention_factor": 1.2}
    yarn = YarnScaling(**sizes, beta_fast=2**9.5, beta_slow=2**8.75, truncate=False)
    low, high = yarn_bounds(16, 4.0, yarn)
    assert (round(low, 3), round(high, 3)) == (2, 5)
    plain = inverse_frequencies(16, 4.0, None)
    kept = torch.tensor([1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0])
    torch.testing.assert_close(
        inverse_frequencies(16, 4.0, yarn), plain * kept + plain / 4 * (1 - kept), atol=1e-4, rtol=0
    )
    positions = torch.tensor([[3, 700]]).expand(3, -1)
    cos, _ = text_rotary(
        positions, head_dim=16, theta=4.0, section=(4, 2, 2), dtype=torch.float32, yarn=replace(yarn, factor=1.0)
    )
    unstretched, _ = text_rotary(positions, head_dim=16, theta=4.0, section=(4, 2, 2), dtype=torch.float32)
    torch.testing.assert_close(cos, 1.2 * unstretched, atol=1e-4, rtol=1e-4)


def test_vision_angles_first_rows_then_columns():
    cos, _ = vision_rotary(torch.tensor([[2, 5]]), head_dim=8)
    angles = torch.tensor([2.0, 0.02, 5.0, 0.05] * 2)
    torch.testing.assert_close(cos[0, 0], angles.cos())


@given(st.integers(1, 3), st.integers(0, 500))
def test_rotation_keeps_lengths_and_depends_on_distance_only(heads, shift):
    x = torch.randn(2, heads, 12, generator=torch.Generator().manual_seed(0))
    scores = []
    for offset in (0, shift):
        positions = torch.tensor([5, 9]).expand(3, 2) + offset
        rotary = text_rotary(positions, head_dim=12, theta=1e4, section=(2, 2, 2), dtype=torch.float32)
        rotated = apply_rotary(x, *rotary)
        torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
        scores.append((rotated[0] * rotated[1]).sum(-1))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=1e-3)


def test_patch_order_of_a_square_frame():
    first_rows = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    last_rows = [(2, 0), (2, 1), (3, 0), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    assert list(map(tuple, patch_coordinates([(1, 4, 4)], 2).tolist())) == first_rows + last_rows


@given(
    grids=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    merge=st.integers(1, 3),
)
def test_patch_order_by_formula(grids, merge):
    grids = [(t, h * merge, w * merge) for t, h, w in grids]
    expected = [
        (
            n // (merge * width) * merge + n // merge % merge,
            n % (merge * width) // merge**2 * merge + n % merge,
        )
        for frames, height, width in grids
        for _ in range(frames)
        for n in range(height * width)
    ]
    assert list(map(tuple, patch_coordinates(grids, merge).tolist())) == expected
