"""Rotary embeddings: interleaved three-axis M-RoPE for text, two-axis for vision.

No buffers: inverse frequencies come in float32 from the config, so neither a meta-device build nor a cast of the model
can damage them.

Dims: T tokens, N heads, H head size, J = H / 2 frequencies.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.model.config import YarnScaling


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


def inverse_frequencies(
    head_dim: int, theta: float, yarn: YarnScaling | None, device: torch.device | str = "cpu"
) -> Tensor:
    """`[J]` float32, radians per position."""
    exponent_J = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    if yarn is None:
        return 1.0 / theta**exponent_J
    wave_J = theta**exponent_J
    low, high = yarn_bounds(head_dim, theta, yarn)
    ramp_J = (torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)
    kept_J = 1 - ramp_J.clamp(0, 1)
    return 1.0 / (yarn.factor * wave_J) * (1 - kept_J) + 1.0 / wave_J * kept_J


def yarn_bounds(head_dim: int, theta: float, yarn: YarnScaling) -> tuple[float, float]:
    """Between which indexes the frequencies go over from kept to divided by the factor.

    Frequency j turns `n = length / (2 pi theta^(2j / H))` times within the original length: solved for j at both betas.
    """
    turns_at_0 = yarn.original_max_position_embeddings / (2 * math.pi)
    low, high = (
        head_dim * math.log(turns_at_0 / beta) / (2 * math.log(theta)) for beta in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


@functools.cache
@torch.inference_mode(False)
def _frequencies(
    theta: float, axes: tuple[int, ...], yarn: YarnScaling | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inverse frequencies `[J, 1]` float32 and the axis of each `[J]`: the same in every step."""
    return inverse_frequencies(2 * len(axes), theta, yarn, device)[:, None], torch.tensor(axes, device=device)


def text_rotary(
    positions: Tensor,
    *,
    head_dim: int,
    theta: float,
    section: tuple[int, int, int],
    dtype: torch.dtype,
    yarn: YarnScaling | None = None,
    use_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, 1, H]` in the model's dtype, from integer positions `[3, T]`; angles are float32. `use_kernel`:
    where there is one, for bfloat16."""
    inv_freq_J1, axis_J = _frequencies(theta, tuple(mrope_axes(head_dim // 2, section)), yarn, positions.device)
    if use_kernel and dtype == torch.bfloat16 and positions.stride(1) == 1 and not torch.compiler.is_compiling():
        return ops.text_rotary(positions, inv_freq_J1.view(-1), axis_J, 1.0 if yarn is None else yarn.attention_factor)
    angles_TJ = (positions[axis_J].float() * inv_freq_J1).T
    angles_T1H = torch.cat((angles_TJ, angles_TJ), dim=-1)[:, None, :]
    cos_T1H, sin_T1H = angles_T1H.cos(), angles_T1H.sin()
    if yarn is not None:
        cos_T1H, sin_T1H = cos_T1H * yarn.attention_factor, sin_T1H * yarn.attention_factor
    return cos_T1H.to(dtype), sin_T1H.to(dtype)


def vision_rotary(row_col_T2: Tensor, *, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin `[T, 1, H]` float32, from integer patch coordinates (row, col): first half rows, second half cols."""
    exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=row_col_T2.device) / (head_dim // 2)
    inv_freq = 1.0 / (theta**exponent)
    angles_TJ = (row_col_T2.float()[:, :, None] * inv_freq).flatten(1)
    angles_T1H = torch.cat((angles_TJ, angles_TJ), dim=-1)[:, None, :]
    return angles_T1H.cos(), angles_T1H.sin()


def apply_rotary(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other (NeoX form)."""
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos_T1H + torch.cat((-second, first), dim=-1) * sin_T1H
