"""Attention and the one seam through which a batch reaches it.

A module computes q, k, v for packed tokens and hands them to `forward_batch.attend`. How sequences are told apart, and
whether keys come from this call or from pages, is the batch's business: new kernels change no module.

Dims: T packed tokens, N query heads, G kv heads, H head size, B sequences, L longest context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.model.config import TextConfig
from qwen3vl_disagg.model.layers import Linear, RMSNorm, project
from qwen3vl_disagg.model.moe import DispatchPlan
from qwen3vl_disagg.model.rope import apply_rotary

LayerCache = tuple[Tensor, Tensor]


class ForwardBatch(ABC):
    """Several sequences packed behind one another: `seq_lens[b]` tokens of sequence b in this call.

    `logit_rows` are the packed rows whose logits are wanted, None for all of them. `dispatch_plan`: where experts are
    spread over ranks, what these have agreed on for this step.
    """

    seq_lens: list[int]
    logit_rows: Tensor | None
    dispatch_plan: DispatchPlan | None = None

    @staticmethod
    def for_prompt(seq_lens: Sequence[int], last_only: bool = True) -> ForwardBatch:
        """Whole sequences, causal, no pages, differentiable."""
        return PromptBatch(seq_lens, last_only=last_only)

    @property
    def num_tokens(self) -> int:
        return sum(self.seq_lens)

    def layer_cache(self, layer: int) -> LayerCache | None:
        """What `attend` needs of `layer`'s key-value cache. Called outside the compiled step."""
        return None

    @abstractmethod
    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, cache: LayerCache | None) -> Tensor:
        """Causal attention within each sequence -> `[T, N, H]`."""

    def select(self, x_TD: Tensor) -> Tensor:
        """The rows whose logits are wanted."""
        return x_TD if self.logit_rows is None else x_TD[self.logit_rows.to(x_TD.device)]


class PromptBatch(ForwardBatch):
    """Sequences from their first token on, no cache: for training and as the reference."""

    def __init__(self, seq_lens: Sequence[int], *, last_only: bool) -> None:
        self.seq_lens = list(seq_lens)
        if not self.seq_lens or min(self.seq_lens) < 1:
            raise ValueError(f"each sequence needs at least one token, got lengths {self.seq_lens}")
        self.logit_rows = torch.tensor(self.seq_lens).cumsum(0) - 1 if last_only else None
        lens_B = torch.tensor(self.seq_lens)
        token_L = torch.arange(int(lens_B.max()))
        self.is_token_BL = token_L < lens_B[:, None]
        # Padding repeats the sequence's first row. One gather, because a copy per sequence is slow to differentiate.
        starts_B1 = (lens_B.cumsum(0) - lens_B)[:, None]
        self.rows_BL = torch.where(self.is_token_BL, starts_B1 + token_L, starts_B1)
        self.padded_rows_T = self.is_token_BL.flatten().nonzero().squeeze(1)

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, cache: LayerCache | None) -> Tensor:
        # Right padding is invisible to a causal mask, so one SDPA call serves sequences of different lengths.
        group = q_TNH.shape[1] // k_TGH.shape[1]
        q, k, v = (self._pad(x).transpose(1, 2) for x in (q_TNH, k_TGH, v_TGH))
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        if len(set(self.seq_lens)) == 1:
            return out.reshape(q_TNH.shape)
        return out.flatten(0, 1).index_select(0, self.padded_rows_T.to(out.device))

    def _pad(self, x_TNH: Tensor) -> Tensor:
        """`[T, N, H]` -> `[B, longest, N, H]`."""
        if len(set(self.seq_lens)) == 1:
            return x_TNH.unflatten(0, (len(self.seq_lens), self.seq_lens[0]))
        rows = x_TNH.index_select(0, self.rows_BL.flatten().to(x_TNH.device))
        return rows.unflatten(0, self.rows_BL.shape)


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on each head of q and k before the rotary embedding; no biases."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(query_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], forward_batch: ForwardBatch, cache: LayerCache | None
    ) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in project(x_TD, self.q_proj, self.k_proj, self.v_proj))
        q_TNH, k_TGH = self._norm_and_rotate(self.q_norm, q, rotary), self._norm_and_rotate(self.k_norm, k, rotary)
        return self.o_proj(forward_batch.attend(q_TNH, k_TGH, v, cache).flatten(1))

    @staticmethod
    def _norm_and_rotate(norm: RMSNorm, x_TNH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if norm.use_kernel and not torch.compiler.is_compiling():
            return ops.norm_rotary(x_TNH, norm.weight, norm.eps, *rotary)
        return apply_rotary(norm(x_TNH), *rotary)
