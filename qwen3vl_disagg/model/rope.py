"""Rotary embeddings: interleaved three-axis M-RoPE for text, two-axis for vision.

No buffers: inverse frequencies come in float32 from the config, so neither a meta-device build nor a cast of the model
can damage them.

Dims: T tokens, N heads, H head size, J = H / 2 frequencies.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def mrope_axes(num_frequencies: int, section: tuple[int, int, int]) -> list[int]:
    """Which axis (0 time, 1 height, 2 width) drives each frequency.

    Height takes j = 1, 4, 7, .. below 3 * section[1], width j = 2, 5, 8, .. below 3 * section[2], time the rest:
    for 64 frequencies and [24, 20, 20] that is THW twenty times, then TTTT.
    """
    axes = []
    for j in range(num_frequencies):
        if j % 3 == 1 and j < 3 * section[1]:
            axes.append(1)
        elif j % 3 == 2 and j < 3 * section[2]:
            axes.append(2)
        else:
            axes.append(0)
    return axes


@functools.cache
@torch.inference_mode(False)
def _frequencies(theta: float, axes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inverse frequencies `[J, 1]` float32 and the axis of each `[J]`: the same in every step."""
    head_dim = 2 * len(axes)
    exponent_J = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return (1.0 / theta**exponent_J)[:, None], torch.tensor(axes, device=device)


def text_rotary(
    positions: Tensor, *, head_dim: int, theta: float, section: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, 1, H]` in the model's dtype, from integer positions `[3, T]`; angles are float32."""
    inv_freq_J1, axis_J = _frequencies(theta, tuple(mrope_axes(head_dim // 2, section)), positions.device)
    angles_TJ = (positions[axis_J].float() * inv_freq_J1).T
    angles_T1H = torch.cat((angles_TJ, angles_TJ), dim=-1)[:, None, :]
    return angles_T1H.cos().to(dtype), angles_T1H.sin().to(dtype)


def vision_rotary(row_col_T2: Tensor, *, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, 1, H]` float32, from integer patch coordinates (row, col): first half rows, second half cols."""
    exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=row_col_T2.device) / (head_dim // 2)
    inv_freq = 1.0 / (10000.0**exponent)
    angles_TJ = (row_col_T2.float()[:, :, None] * inv_freq).flatten(1)
    angles_T1H = torch.cat((angles_TJ, angles_TJ), dim=-1)[:, None, :]
    return angles_T1H.cos(), angles_T1H.sin()


def apply_rotary(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other (NeoX form)."""
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos_T1H + torch.cat((-second, first), dim=-1) * sin_T1H
