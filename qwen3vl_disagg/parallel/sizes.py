"""What the model takes, from its config alone: bytes of weights, keys and values and rows; operations; bytes between
ranks. Pure arithmetic: no hardware, no seconds.

D hidden, E experts of width F, K of them per token, E_l of them on a rank, L language ranks, n DeepStack levels.
Routing is taken to be uniform and independent: each token picks K of E experts, all equally likely. One multiply-add is
2 FLOPs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen3vl_disagg.core.settings import BufferOptions, EncodeOptions, default_page_size
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.protocol.layout import RowSizes

FLOAT32_BYTES = 4
PICK_BYTES = 48
"""Of each logit, at the same time: float32 as it is and without what may not come, weights, their sums, ties, in int64,
and what lies between."""
GRAPH_LAYER_BYTES = 1 << 19
"""A guess."""


@dataclass(frozen=True)
class Part:
    """Weights that are treated alike. `channels`: output channels, each of which has a scale when quantized."""

    weights: int
    channels: int = 0
    """0: never quantized."""

    def __add__(self, other: Part) -> Part:
        return Part(self.weights + other.weights, self.channels + other.channels)

    def times(self, count: int) -> Part:
        return Part(self.weights * count, self.channels * count)


def _matrix(rows: int, columns: int) -> Part:
    return Part(rows * columns, rows)


@dataclass(frozen=True)
class SizedModel:
    """A model as it is served. `is_int8`: the decoder's matrices are int8 with a float32 scale per output channel."""

    config: ModelConfig
    itemsize: int
    """Bytes of a weight or an activation."""
    is_int8: bool = False
    is_cuda: bool = True

    # ---- weights ----

    def num_bytes(self, part: Part) -> int:
        """Bytes of a part of the decoder."""
        if self.is_int8 and part.channels:
            return part.weights + FLOAT32_BYTES * part.channels
        return part.weights * self.itemsize

    @property
    def moe_layers(self) -> int:
        text = self.config.text
        return sum(text.is_moe_layer(layer) for layer in range(text.num_hidden_layers))

    @property
    def decoder_parts(self) -> dict[str, Part]:
        """Everything on a language rank but the experts."""
        text = self.config.text
        hidden, layers, head_dim = text.hidden_size, text.num_hidden_layers, text.head_dim
        query, kv = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
        attention = _matrix(query, hidden) + _matrix(kv, hidden).times(2) + _matrix(hidden, query)
        wide = _matrix(text.intermediate_size, hidden).times(2) + _matrix(hidden, text.intermediate_size)
        own_head = _matrix(text.vocab_size, hidden)
        return {
            "embedding": Part(text.vocab_size * hidden),
            "attention": attention.times(layers),
            "dense MLPs": wide.times(layers - self.moe_layers),
            "routers": Part(text.num_experts * hidden * self.moe_layers),
            "norms": Part((2 * hidden + 2 * head_dim) * layers + hidden),
            "head": Part(0) if self.config.tie_word_embeddings else own_head,
        }

    @property
    def expert(self) -> Part:
        """One expert of one layer: gate, up and down."""
        text = self.config.text
        width = text.moe_intermediate_size
        return _matrix(2 * width, text.hidden_size) + _matrix(text.hidden_size, width)

    def num_experts_of(self, num_ranks: int) -> list[int]:
        """Experts of a layer on each language rank: `ceil(E / L)`, the last ranks fewer or none (torch.chunk)."""
        total = self.config.text.num_experts
        most = -(-total // num_ranks)
        return [max(0, min(most, total - rank * most)) for rank in range(num_ranks)]

    def replicated_bytes(self) -> int:
        return sum(self.num_bytes(part) for part in self.decoder_parts.values())

    def experts_bytes(self, num_experts: float) -> float:
        """Of `num_experts` experts in each MoE layer."""
        return num_experts * self.moe_layers * self.num_bytes(self.expert)

    def tower_bytes(self) -> int:
        """Of the vision tower, which is never quantized."""
        return self._tower_weights * self.itemsize

    @property
    def _tower_weights(self) -> int:
        vision = self.config.vision
        width, inside, merged = vision.hidden_size, vision.intermediate_size, vision.hidden_size * vision.merge_unit
        embed = vision.patch_dim * width + width + vision.num_position_embeddings * width
        block = 4 * width + (width + 1) * 3 * width + (width + 1) * width + (width + 1) * inside + (inside + 1) * width
        merger = (merged + 1) * merged + (merged + 1) * vision.out_hidden_size
        levels = len(vision.deepstack_visual_indexes)
        return embed + vision.depth * block + (1 + levels) * merger + 2 * width + levels * 2 * merged

    # ---- a step of the decoder ----

    def step_weight_bytes(self, tokens: int) -> int:
        """Read once a step by a rank that has tokens, experts aside, and their rows of the embedding."""
        parts = dict(self.decoder_parts)
        embedding = parts.pop("embedding")
        if self.config.tie_word_embeddings:
            parts["head"] = embedding
        rows = tokens * self.config.text.hidden_size * self.itemsize
        return sum(self.num_bytes(part) for part in parts.values()) + rows

    def kv_token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        text = self.config.text
        return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * self.itemsize

    def step_flop(self, tokens: int, logits: int, pairs: float) -> float:
        """Of one rank's own tokens, experts aside. `pairs`: tokens times what each of them looks back at."""
        text, parts = self.config.text, self.decoder_parts
        each = parts["attention"].weights + parts["dense MLPs"].weights + parts["routers"].weights
        scores = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * pairs
        return 2 * each * tokens + 2 * text.vocab_size * text.hidden_size * logits + scores

    def touched_experts(self, num_experts: int, tokens: int) -> float:
        """Of `num_experts` experts of a layer, how many `tokens` tokens choose: a token misses one with 1 - K / E."""
        text = self.config.text
        if not num_experts:
            return 0.0
        return num_experts * (1.0 - (1.0 - text.num_experts_per_tok / text.num_experts) ** tokens)

    def experts_flop(self, num_experts: int, tokens: int) -> float:
        """On a rank with `num_experts` of each layer, for `tokens` tokens of all ranks."""
        text = self.config.text
        if not num_experts:
            return 0.0
        choices = tokens * text.num_experts_per_tok * num_experts / text.num_experts
        return 2.0 * self.expert.weights * choices * self.moe_layers

    # ---- between language ranks ----

    def gather_bytes(self, num_ranks: int, rows: int) -> int:
        """Sent by each rank in one MoE layer: `rows` rows (all ranks bring as many) of D + 2 K numbers to all others,
        and D partial sums for each row of all others back to them."""
        text = self.config.text
        back = FLOAT32_BYTES if self.is_cuda else self.itemsize  # as `GroupCollectives.reduce_scatter` sends them
        there = (text.hidden_size + 2 * text.num_experts_per_tok) * self.itemsize
        return (num_ranks - 1) * rows * (there + text.hidden_size * back)

    def all_to_all_bytes(self, num_ranks: int, rows: int) -> float:
        """Sent for `rows` tokens in one MoE layer, there and back: only to other ranks with one of their experts."""
        text = self.config.text
        total, chosen = text.num_experts, text.num_experts_per_tok
        missed = sum(_miss(total, here, chosen) for here in self.num_experts_of(num_ranks))
        others = (num_ranks - missed) * (num_ranks - 1) / num_ranks
        return rows * others * (2 * text.hidden_size + 2 * chosen) * self.itemsize

    # ---- images ----

    def tower_flop(self, visual_tokens: int) -> float:
        """The tower over one image of one frame, mergers included."""
        vision = self.config.vision
        patches = visual_tokens * vision.merge_unit
        block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        merged = vision.hidden_size * vision.merge_unit
        mergers = (1 + len(vision.deepstack_visual_indexes)) * (merged * merged + merged * vision.out_hidden_size)
        linear = patches * (vision.patch_dim * vision.hidden_size + vision.depth * block) + visual_tokens * mergers
        return 2.0 * linear + 4.0 * vision.depth * vision.hidden_size * patches**2

    def item_bytes(self, visual_tokens: int) -> int:
        """One image's rows on the way from an encode to a language rank: a main row and n DeepStack rows for each
        visual token, its id and positions."""
        hidden, levels = self.config.text.hidden_size, self.config.num_deepstack_levels
        sizes = RowSizes.of(hidden_size=hidden, num_levels=levels, itemsize=self.itemsize)
        return sizes.transfer_bytes(visual_tokens, visual_tokens)

    # ---- memory ----

    def encode_memory(self, visual_tokens: int) -> dict[str, float]:
        """Bytes on an encode rank by what they are for; activations are an estimate of the largest layer's."""
        vision, options = self.config.vision, EncodeOptions()
        patches = max(visual_tokens, options.vision_batch_tokens) * vision.merge_unit
        wide = 2 * vision.hidden_size + max(4 * vision.hidden_size, vision.intermediate_size)
        return {
            "vision tower": self.tower_bytes(),
            "cache of rows": options.cache_bytes,
            "activations": patches * (4 * vision.patch_dim + wide * self.itemsize),
        }

    def language_memory(
        self, num_ranks: int, requests: int, tokens: int, rows: int, page_size: int | None = None
    ) -> dict[str, float]:
        """Bytes on the language rank with the most experts. `requests` of `tokens` tokens each are on it, `rows` are
        prefilled at once by each rank; activations are an estimate of the largest layer's."""
        text, buffers = self.config.text, BufferOptions()
        page_size = page_size or default_page_size(is_cuda=self.is_cuda)
        pages = requests * math.ceil(tokens / page_size) * page_size
        own = rows * (2 * text.hidden_size + (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim)
        own += rows * 3 * text.intermediate_size if self.moe_layers < text.num_hidden_layers else 0
        everyone = rows * num_ranks if self.moe_layers else 0
        experts = self.num_experts_of(num_ranks)[0]
        choices = everyone * text.num_experts_per_tok * experts / max(1, text.num_experts)
        routed = choices * (2 * text.hidden_size + 3 * text.moe_intermediate_size) + everyone * 2 * text.hidden_size
        return {
            "replicated weights": self.replicated_bytes(),
            "experts": self.experts_bytes(experts),
            "keys and values": pages * self.kv_token_bytes(),
            "room for visual rows": self.item_bytes(buffers.blocks * buffers.block_size),
            "activations": (own + routed) * self.itemsize + 4.0 * max(1, requests) * text.vocab_size,
        }

    def captured_bytes(self, requests: int, num_ranks: int) -> float:
        """Of captured decode steps, which keep what they need: activations of the largest, logits and what the sampler
        makes of them, and what the driver keeps of each graph. An estimate."""
        if not self.is_cuda:
            return 0.0
        text = self.config.text
        activations = self.language_memory(num_ranks, 0, 0, requests)["activations"]
        driver = len(step_sizes(requests)) * text.num_hidden_layers * GRAPH_LAYER_BYTES
        return activations + requests * text.vocab_size * (self.itemsize + PICK_BYTES) + driver


def _miss(total: int, here: int, chosen: int) -> float:
    """The chance that none of a token's `chosen` experts of `total` is among `here` of them."""
    return math.comb(total - here, chosen) / math.comb(total, chosen)


def step_sizes(max_running: int) -> list[int]:
    """Numbers of rows for which decode steps are captured: at most an eighth more than there are requests, or 7.

    >>> step_sizes(40), step_sizes(3), step_sizes(150)[-4:]
    ([1, 2, 4, 8, 16, 24, 32, 40], [1, 2, 3], [120, 128, 144, 150])
    """
    sizes, size = [], 1
    while size < max_running:
        sizes.append(size)
        size += size if size < 8 else max(8, 1 << (size.bit_length() - 4))
    return [*sizes, max_running]


def padded_rows(rows: int) -> int:
    """Room for each rank's rows in a step: few sizes, so that shapes come again; at most half more than is needed from
    32 on.

    >>> [padded_rows(rows) for rows in (1, 3, 33, 65, 130)]
    [2, 4, 48, 96, 192]
    """
    size = 2
    while size < rows:
        size *= 2
    return size * 3 // 4 if size >= 64 and rows <= size * 3 // 4 else size
