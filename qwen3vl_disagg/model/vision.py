"""The vision tower: patches -> one main row and n DeepStack rows for each visual token.

Patch order is fixed by preprocessing: within a frame, merge block by merge block (row, col), inside a block row by row,
so `merge_unit` consecutive patches become one visual token.

Dims: P patches, D tower width, N heads, H head size, R = P / merge_unit visual rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen3vl_disagg.core.tensors import uploaded
from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.model.config import VisionConfig
from qwen3vl_disagg.model.layers import Linear
from qwen3vl_disagg.model.rope import apply_rotary, vision_rotary

Grid = tuple[int, int, int]
_EPS = 1e-6
_MAX_FLASH_HEAD = 256


def patch_coordinates(grids: Sequence[Grid], merge: int) -> Tensor:
    """(row, col) of each patch, `[P, 2]` int64, in the tower's patch order.

    A 4 x 4 frame with merge 2 goes (0,0) (0,1) (1,0) (1,1) (0,2) (0,3) (1,2) (1,3) (2,0) ..
    """
    parts = []
    for frames, height, width in grids:
        rows = torch.arange(height)[:, None].expand(height, width)
        cols = torch.arange(width)[None, :].expand(height, width)
        frame = torch.stack((rows, cols), dim=-1)
        frame = frame.view(height // merge, merge, width // merge, merge, 2).transpose(1, 2).reshape(-1, 2)
        parts.append(frame.repeat(frames, 1))
    return torch.cat(parts)


class PatchEmbed(nn.Module):
    """A convolution whose kernel equals its stride, run as the matmul that it is."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(pixels.to(weight.dtype), weight, self.proj.bias)


class PositionEmbedding(nn.Embedding):
    """A learned square table, read by bilinear interpolation with aligned corners; float32 until the last cast."""

    def forward(self, coords_P2: Tensor, sizes_P2: Tensor) -> Tensor:  # type: ignore[override]
        """Embedding `[P, D]` float32 of patches at `coords` in frames of `sizes` (height, width) patches."""
        side = round(self.num_embeddings**0.5)
        source_P2 = coords_P2.float() * (side - 1) / (sizes_P2 - 1).clamp(min=1).float()
        low_P2 = source_P2.floor().long()
        high_P2 = (low_P2 + 1).clamp(max=side - 1)
        frac_P2 = source_P2 - low_P2
        index, weight = [], []
        for row, row_weight in ((low_P2, 1 - frac_P2), (high_P2, frac_P2)):
            for col, col_weight in ((low_P2, 1 - frac_P2), (high_P2, frac_P2)):
                index.append(row[:, 0] * side + col[:, 1])
                weight.append(row_weight[:, 0] * col_weight[:, 1])
        taps_4PD = super().forward(torch.stack(index)) * torch.stack(weight)[:, :, None]
        return taps_4PD.sum(0)


def sdpa_backends(q_PNH: Tensor) -> AbstractContextManager[None]:
    """On CUDA flash attention, or the one that saves memory: what is chosen is not to follow from the shape, as cuDNN
    would, nor to keep a matrix of all pairs of patches. That is left to heads that neither takes."""
    if q_PNH.device.type != "cuda":
        return nullcontext()
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return sdpa_kernel(backends if q_PNH.shape[2] % 8 == 0 else [*backends, SDPBackend.MATH])


def takes_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash attention over frames of any lengths takes such heads: from Ampere on, numbers of 16 bits, sizes
    that are multiples of 8."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_dim % 8 == 0 and head_dim <= _MAX_FLASH_HEAD and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_frames(
    q_PNH: Tensor, k_PNH: Tensor, v_PNH: Tensor, cu_seqlens: Tensor, cu_on_gpu: Tensor | None = None
) -> Tensor:
    """Full attention within each frame -> `[P, N, H]`. `cu_seqlens` `[frames + 1]` int64: where frames begin, and the
    end; on the host, because it decides the shapes. `cu_on_gpu`: the same as int32 on the device, where `takes_varlen`
    says that one call can have all frames; without it each run of equal frames is a call."""
    if cu_on_gpu is not None:
        from torch.nn.attention.varlen import varlen_attn  # brings the compiler, which a CPU may start without

        longest = int(cu_seqlens.diff().max())
        out_PNH: Tensor = varlen_attn(q_PNH, k_PNH, v_PNH, cu_on_gpu, cu_on_gpu, longest, longest)  # type: ignore[assignment]
        return out_PNH
    outs, start = [], 0
    for length, run in groupby(cu_seqlens.diff().tolist()):  # neighbours of one length share a batched call
        count = len(list(run))
        rows = slice(start, start + count * length)
        frames = [x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q_PNH, k_PNH, v_PNH)]
        with sdpa_backends(q_PNH):
            outs.append(F.scaled_dot_product_attention(*frames).transpose(1, 2).flatten(0, 1))
        start = rows.stop
    return torch.cat(outs)


def _attend_frames_opaque(
    q_PNH: Tensor, k_PNH: Tensor, v_PNH: Tensor, cu_seqlens: Tensor, cu_on_gpu: Tensor | None = None
) -> Tensor:
    if ops.can_attend_frames(q_PNH.shape[2], q_PNH):
        return ops.full_attention(q_PNH, k_PNH, v_PNH, cu_seqlens.diff().tolist())
    return attend_frames(q_PNH, k_PNH, v_PNH, cu_seqlens, cu_on_gpu)


# The compiler need not know how long the frames are.
_library = torch.library.Library("q3vl", "FRAGMENT")
_library.define("attend_frames(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_on_gpu=None) -> Tensor")
_library.impl("attend_frames", _attend_frames_opaque, "CompositeExplicitAutograd")


@torch.library.register_fake("q3vl::attend_frames")
def _(q_PNH: Tensor, *_: Tensor | None) -> Tensor:
    return q_PNH.new_empty(q_PNH.shape)


class VisionAttention(nn.Module):
    """Full attention within each frame, none across frames or images."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.hidden_size // config.num_heads
        self.use_kernel = False
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(
        self, x_PD: Tensor, cu_seqlens: Tensor, rotary: tuple[Tensor, Tensor], cu_on_gpu: Tensor | None = None
    ) -> Tensor:
        qkv_P3NH = self.qkv(x_PD).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv_P3NH.unbind(1)
        is_compiling = torch.compiler.is_compiling()
        if self.use_kernel and not is_compiling and ops.can_attend_frames(self.head_dim, qkv_P3NH):
            ops.rotate_(qkv_P3NH[:, :2].flatten(1, 2), *rotary)
            out_PNH = ops.full_attention(q, k, v, cu_seqlens.diff().tolist())
        else:
            q, k = (apply_rotary(x.float(), *rotary).to(x.dtype) for x in (q, k))
            attend = torch.ops.q3vl.attend_frames if is_compiling else attend_frames
            out_PNH = attend(q, k, v, cu_seqlens, cu_on_gpu)
        return self.proj(out_PNH.flatten(1))


class VisionMlp(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.use_kernel = False
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x_PD: Tensor) -> Tensor:
        if self.linear_fc1.use_tiles and not torch.compiler.is_compiling():
            fc1 = self.linear_fc1
            return self.linear_fc2(ops.many_rows(x_PD, [fc1.weight], fc1.bias, is_gelu=True))
        inner_PF = self.linear_fc1(x_PD)
        if self.use_kernel and not torch.compiler.is_compiling() and ops.is_cpu_bf16(inner_PF):
            return self.linear_fc2(ops.gelu_tanh_(inner_PF))
        return self.linear_fc2(F.gelu(inner_PF, approximate="tanh"))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config)

    def forward(
        self, x_PD: Tensor, cu_seqlens: Tensor, rotary: tuple[Tensor, Tensor], cu_on_gpu: Tensor | None = None
    ) -> Tensor:
        x_PD = x_PD + self.attn(self.norm1(x_PD), cu_seqlens, rotary, cu_on_gpu)
        return x_PD + self.mlp(self.norm2(x_PD))


class PatchMerger(nn.Module):
    """Merge blocks of patches into visual tokens of the decoder's width. GELU is the exact (erf) one.

    The main merger norms each patch before regrouping, the DeepStack mergers the regrouped row.
    """

    def __init__(self, config: VisionConfig, *, norm_after_regroup: bool) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_unit
        self.norm_after_regroup = norm_after_regroup
        self.norm = nn.LayerNorm(self.width if norm_after_regroup else config.hidden_size, eps=_EPS)
        self.linear_fc1 = Linear(self.width, self.width, bias=True)
        self.linear_fc2 = Linear(self.width, config.out_hidden_size, bias=True)

    def forward(self, x_PD: Tensor) -> Tensor:
        if self.norm_after_regroup:
            rows = self.norm(x_PD.reshape(-1, self.width))
        else:
            rows = self.norm(x_PD).reshape(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(rows)))


class VisionTower(nn.Module):
    """Patch embedding, blocks, the main merger and one merger for each DeepStack level.

    `before_block`, where somebody else wants to compute, too, is called before each block.
    """

    before_block: Callable[[], None] | None = None

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = PositionEmbedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_after_regroup=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, norm_after_regroup=True) for _ in config.deepstack_visual_indexes
        )

    def forward(self, pixels: Tensor, grid_thw: Tensor | Sequence[Grid]) -> tuple[Tensor, list[Tensor]]:
        """Main rows `[R, out]` and the n DeepStack levels, each `[R, out]`, in the tower's dtype.

        Args:
            pixels: `[P, patch_dim]` float, all images behind one another.
            grid_thw: frames, height and width in patches of each image, `[images, 3]`; best kept on the host.
        """
        grids = [(t, h, w) for t, h, w in torch.as_tensor(grid_thw).tolist()]  # shapes decide on the host
        merge = self.config.spatial_merge_size
        expected = sum(t * h * w for t, h, w in grids)
        if pixels.shape != (expected, self.config.patch_dim):
            raise ValueError(f"pixels {tuple(pixels.shape)} do not fit grids {grids}: {expected} patches")
        if any(h % merge or w % merge for _, h, w in grids):
            raise ValueError(f"grids {grids}: heights and widths must be multiples of {merge}")
        coords = uploaded(patch_coordinates(grids, merge), pixels.device)
        counts = torch.tensor([t * h * w for t, h, w in grids])
        sizes = uploaded(torch.tensor([g[1:] for g in grids]).repeat_interleave(counts, dim=0), pixels.device)
        cu_seqlens = torch.tensor([0, *(h * w for t, h, w in grids for _ in range(t))]).cumsum(0)
        head_dim = self.config.hidden_size // self.config.num_heads
        rotary = vision_rotary(coords, head_dim=head_dim, theta=self.config.rope_theta)
        is_varlen = takes_varlen(pixels.device, self.patch_embed.proj.weight.dtype, head_dim)
        cu_on_gpu = uploaded(cu_seqlens.int(), pixels.device) if is_varlen else None

        x_PD = self.patch_embed(pixels)
        x_PD = x_PD + self.pos_embed(coords, sizes).to(x_PD.dtype)
        levels = []
        mergers = dict(zip(self.config.deepstack_visual_indexes, self.deepstack_merger_list, strict=True))
        for i, block in enumerate(self.blocks):
            if self.before_block is not None:
                self.before_block()
            x_PD = self.step(block, x_PD, cu_seqlens, rotary, cu_on_gpu)
            if i in mergers:
                levels.append(mergers[i](x_PD))
        return self.merger(x_PD), levels

    def step(
        self,
        block: nn.Module,
        x_PD: Tensor,
        cu_seqlens: Tensor,
        rotary: tuple[Tensor, Tensor],
        cu_on_gpu: Tensor | None = None,
    ) -> Tensor:
        """The region to compile: one block."""
        return block(x_PD, cu_seqlens, rotary, cu_on_gpu)
