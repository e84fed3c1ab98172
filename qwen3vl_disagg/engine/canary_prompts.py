"""The prompts of a canary, and what the checkpoint's own decoder makes of them, layer by layer.

Dims: T packed tokens, D hidden size, E experts, R visual rows of all prompts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_disagg.checkpoint.reference import Reference
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.engine.requests import make_sequences
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.model.attention import LayerCache, PromptBatch
from qwen3vl_disagg.model.moe import SparseMoe
from qwen3vl_disagg.model.rope import text_rotary
from qwen3vl_disagg.transport.buffers import VisualRows

TEXTS = ((2, 3), (4, 2), (1, 5))
"""Of each prompt: tokens before the image, and behind it."""
_GRID = (2, 3)
"""Rows and columns of an image's visual tokens."""


@dataclass
class Prompts:
    """`sequences` without pages; `next_ids`: the token that each is given to decode."""

    sequences: list[Sequence]
    next_ids: list[int]

    @classmethod
    def make(cls, config: ModelConfig) -> Prompts:
        """The same ones each time, as far as they fit the context."""
        merge, (rows, cols) = config.vision.spatial_merge_size, _GRID
        visual = {config.image_token_id, config.video_token_id}
        words = [token for token in range(config.text.vocab_size) if token not in visual]
        generator = torch.Generator().manual_seed(0)
        made, room = cls([], []), config.text.max_position_embeddings
        for number, (before, behind) in enumerate(TEXTS):
            picks = torch.randint(len(words), (before + behind + 1,), generator=generator).tolist()
            ids = [words[pick] for pick in picks]
            item = VisualItem(
                modality="image",
                digest="",
                num_bytes=0,
                grid=(1, rows * merge, cols * merge),
                num_rows=rows * cols,
                offset=before,
                param="canary",
            )
            token_ids = [*ids[:before], *[config.image_token_id] * item.num_rows, *ids[before:-1]]
            if len(token_ids) + 2 <= room:
                sampling = SamplingParams(max_new_tokens=2)
                made.sequences += make_sequences(config, f"canary {number}", token_ids, [item], sampling, room=room)
                made.next_ids.append(ids[-1])
        return made

    def give_pages(self, page_size: int, num_pages: int, max_running: int) -> list[Sequence]:
        """Those that can run, with the first pages of the caches."""
        first, able = 0, self.sequences[:max_running]
        for number, sequence in enumerate(able):
            stop = first + -(-(sequence.num_prompt + 1) // page_size)
            if stop > num_pages:
                return able[:number]
            sequence.pages, first = list(range(first, stop)), stop
        return able

    @property
    def lens(self) -> list[int]:
        """With the next token."""
        return [sequence.num_prompt + 1 for sequence in self.sequences]

    @property
    def is_visual_T(self) -> Tensor:
        """Of all tokens, the next ones among them."""
        marks = []
        for sequence in self.sequences:
            item = sequence.items[0]
            marks += [item.offset <= token < item.stop for token in range(sequence.num_prompt + 1)]
        return torch.tensor(marks)


class _Noting(PromptBatch):
    """Keeps the keys and values of each layer that it attends in."""

    def __init__(self, seq_lens: Seq[int]) -> None:
        super().__init__(seq_lens, last_only=False)
        self.noted: list[tuple[Tensor, Tensor]] = []

    def attend(self, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, cache: LayerCache | None) -> Tensor:
        self.noted.append((k_TGH, v_TGH))
        return super().attend(q_TNH, k_TGH, v_TGH, cache)


@dataclass
class Known:
    """What was put in, and what has to come out. Visual rows are in the model's dtype."""

    main_RD: Tensor
    levels: list[Tensor] = field(default_factory=list)
    """Of each DeepStack level `[R, D]`: as large as what it is added to, so that losing it shows."""
    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each layer that was computed, keys and values `[T, G, H]`."""
    logits_TV: Tensor | None = None
    """None where not all layers were computed."""
    experts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> a row for each expert `[E, D]`, and what that expert makes of it."""

    def rows(self, number: int, without: int | None = None) -> VisualRows:
        """Of a prompt's image, in two pieces; `without`: a level that is zero."""
        count = math.prod(_GRID)
        here = slice(number * count, (number + 1) * count)
        levels = [level.new_zeros(level.shape) if i == without else level for i, level in enumerate(self.levels)]
        main, deepstack = self.main_RD[here], torch.cat([self.main_RD[:, :0], *levels], dim=1)[here]
        pieces = [tuple((first, x[first : first + count // 2]) for first in (0, count // 2)) for x in (main, deepstack)]
        return VisualRows(1, 0, count, *pieces)


def know(reference: Reference, prompts: Prompts, num_layers: int, dtype: torch.dtype) -> Known:
    """Let the checkpoint's own decoder compute the prompts, up to that many layers, in float32."""
    config, text = reference.config, reference.config.text
    ids = [i for s, next_id in zip(prompts.sequences, prompts.next_ids, strict=True) for i in [*s.token_ids, next_id]]
    positions = torch.cat([s.positions_of(0, s.num_prompt + 1) for s in prompts.sequences], dim=1)
    generator = torch.Generator().manual_seed(1)
    is_visual_T, batch = prompts.is_visual_T, _Noting(prompts.lens)

    def like(x_RD: Tensor) -> Tensor:
        """Noise of the same size, as the model's dtype has it."""
        return (torch.randn(x_RD.shape, generator=generator) * x_RD.pow(2).mean().sqrt()).to(dtype)

    x_TD = reference.rows("model.embed_tokens.weight", ids)
    known = Known(like(x_TD[is_visual_T]))
    x_TD = x_TD.masked_scatter(is_visual_T[:, None], known.main_RD.float())
    rotary = text_rotary(
        positions,
        head_dim=text.head_dim,
        theta=text.rope_theta,
        section=text.mrope_section,
        dtype=torch.float32,
        yarn=text.yarn,
        use_kernel=False,
    )
    for i in range(num_layers):
        with reference.part(f"model.layers.{i}") as layer:
            x_TD = layer(x_TD, rotary, batch, None)
            if isinstance(layer.mlp, SparseMoe):
                known.experts[i] = _each_expert(layer.mlp, generator, dtype)
        if i < config.num_deepstack_levels:
            known.levels.append(like(x_TD[is_visual_T]))
            x_TD = x_TD.index_add(0, is_visual_T.nonzero()[:, 0], known.levels[i].float())
    known.levels += [known.main_RD] * (config.num_deepstack_levels - len(known.levels))
    known.caches = batch.noted
    if num_layers == text.num_hidden_layers:
        with reference.part("model.norm") as norm, reference.part(head_of(config)) as head:
            known.logits_TV = F.linear(norm(x_TD), head.weight)
    return known


def head_of(config: ModelConfig) -> str:
    """The part that has the head's weight."""
    return "model.embed_tokens" if config.tie_word_embeddings else "lm_head"


def choose_each(num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights and ids `[E, 1]` of rows each of which goes to one expert."""
    return torch.ones(num_experts, 1), torch.arange(num_experts)[:, None]


def _each_expert(moe: SparseMoe, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_experts, hidden = moe.gate.weight.shape
    x_ED = torch.randn(num_experts, hidden, generator=generator).to(dtype)
    return x_ED, moe.experts(x_ED.float(), *choose_each(num_experts))
