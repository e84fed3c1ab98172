"""What the hardware allows: bytes and operations of a step, from the config alone, over measured rates.

Weights are read once a step, whatever the batch; of the experts, only those that some token chose. Every number is a
least: a real step also writes activations, normalizes, samples, and reads some things twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3vl_disagg.model.config import ModelConfig, TextConfig, VisionConfig


@dataclass(frozen=True)
class Rates:
    """Measured on this machine with all the threads of the run: bytes read and operations done per second."""

    bytes_s: float
    flop_s: float


@dataclass(frozen=True)
class Work:
    """The least that something costs."""

    num_bytes: float
    flop: float

    def seconds(self, rates: Rates) -> float:
        """Memory and arithmetic can overlap, so the slower of the two decides."""
        return max(self.num_bytes / rates.bytes_s, self.flop / rates.flop_s)


def distinct_experts(num_experts: int, per_token: int, num_tokens: int) -> float:
    """How many different experts `num_tokens` tokens choose on average when all are equally likely.

    A token misses an expert with probability 1 - k / E, and tokens choose independently.
    """
    return num_experts * (1.0 - (1.0 - per_token / num_experts) ** num_tokens)


def _attention_weights(text: TextConfig) -> int:
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads  # q and o, k and v
    return text.hidden_size * heads * text.head_dim


def _mlp_weights(text: TextConfig, layer: int, num_experts: float) -> float:
    """Of one layer when `num_experts` experts are used: gate, up and down of each, and the router."""
    if text.is_moe_layer(layer):
        return text.num_experts * text.hidden_size + num_experts * 3 * text.hidden_size * text.moe_intermediate_size
    return 3 * text.hidden_size * text.intermediate_size


def _layers(text: TextConfig, num_experts: float) -> float:
    """Weights of all layers, norms aside."""
    layers = range(text.num_hidden_layers)
    return sum(_attention_weights(text) + _mlp_weights(text, layer, num_experts) for layer in layers)


def decode_step(text: TextConfig, *, batch: int, context: float, weight_bytes: float = 2, kv_bytes: float = 2) -> Work:
    """One token for each of `batch` requests that have `context` tokens each (the new one included)."""
    weights = _layers(text, distinct_experts(text.num_experts, text.num_experts_per_tok, batch) if is_moe(text) else 0)
    head = text.vocab_size * text.hidden_size
    kv = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * context
    scores = 2 * 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * context
    per_token = 2 * (_layers(text, text.num_experts_per_tok) + head) + scores
    num_bytes = (weights + head + batch * text.hidden_size) * weight_bytes + batch * kv * kv_bytes
    return Work(num_bytes, batch * per_token)


def prefill(text: TextConfig, *, tokens: int, weight_bytes: float = 2) -> Work:
    """One prompt from the start, causal, logits of its last token only."""
    used = distinct_experts(text.num_experts, text.num_experts_per_tok, tokens) if is_moe(text) else 0
    head = text.vocab_size * text.hidden_size
    pairs = tokens * (tokens + 1) / 2
    scores = 2 * 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * pairs
    flop = 2 * (_layers(text, text.num_experts_per_tok) * tokens + head) + scores
    return Work((_layers(text, used) + head + tokens * text.hidden_size) * weight_bytes, flop)


def is_moe(text: TextConfig) -> bool:
    return text.num_experts > 0


def image(config: ModelConfig, grid: tuple[int, int, int], weight_bytes: float = 2) -> Work:
    """The tower over one image or video of this grid of patches, all mergers included."""
    vision, (frames, height, width) = config.vision, grid
    patches = frames * height * width
    attention = frames * 2 * 2 * (height * width) ** 2 * vision.hidden_size * vision.depth
    rows = patches // vision.merge_unit
    flop = 2 * (patches * _tower_weights(vision) + rows * _merger_weights(vision)) + attention
    return Work((_tower_weights(vision) + _merger_weights(vision)) * weight_bytes, flop)


def _tower_weights(vision: VisionConfig) -> int:
    """Read for each patch: the embedding, then q, k, v, o and the two halves of the MLP of each block."""
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    return vision.patch_dim * vision.hidden_size + vision.depth * block


def _merger_weights(vision: VisionConfig) -> int:
    """Read for each visual token: the main merger and one for each DeepStack level."""
    width = vision.hidden_size * vision.merge_unit
    return (1 + len(vision.deepstack_visual_indexes)) * (width * width + width * vision.out_hidden_size)
