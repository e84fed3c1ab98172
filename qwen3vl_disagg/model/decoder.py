"""The decoder: a template method that runs the layers, with one hook after each.

`forward` is written once, here. A subclass that adds something after a layer overrides `_layer_input` (called outside
the compiled step, knows the layer's index) and `_process_layer_output` (inside it, sees only values).

Dims: T packed tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qwen3vl_disagg.model.attention import Attention, ForwardBatch, LayerCache
from qwen3vl_disagg.model.config import ModelConfig, TextConfig
from qwen3vl_disagg.model.layers import Linear, RMSNorm, SwiGLU
from qwen3vl_disagg.model.moe import DispatchPlan, SparseMoe
from qwen3vl_disagg.model.rope import text_rotary


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP (experts or dense), each added to the residual stream."""

    def __init__(self, config: TextConfig, *, is_moe: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoe(config) if is_moe else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], forward_batch: ForwardBatch, cache: LayerCache | None
    ) -> Tensor:
        attended_TD = self.self_attn(self.input_layernorm(x_TD), rotary, forward_batch, cache)
        x_TD, y_TD = self.post_attention_layernorm.of_sum(x_TD, attended_TD)
        if isinstance(self.mlp, SparseMoe):
            return x_TD + self.mlp(y_TD, forward_batch.dispatch_plan)
        return x_TD + self.mlp(y_TD)


class Qwen3MoeModel(nn.Module):
    """Embedding, layers and final norm; dense models are the same with another MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = self.config = config.text
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(text, is_moe=text.is_moe_layer(i)) for i in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.use_kernel = False

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        **hook_inputs: Any,
    ) -> Tensor:
        """Final hidden states `[T, D]` of packed tokens.

        Args:
            input_ids: `[T]` int64; read only where `input_embeds` is not given.
            positions: `[3, T]` int64: time, height, width.
            forward_batch: how the tokens divide into sequences, and where keys and values live.
            input_embeds: `[T, D]`, taken in place of the embedding of `input_ids`.
            hook_inputs: what a subclass's hook needs; the base takes none.
        """
        x_TD = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        if positions.shape != (3, x_TD.shape[0]) or forward_batch.num_tokens != x_TD.shape[0]:
            raise ValueError(
                f"{x_TD.shape[0]} tokens, positions {tuple(positions.shape)} and a batch of "
                f"{forward_batch.num_tokens} tokens do not fit together"
            )
        text = self.config
        rotary = text_rotary(
            positions,
            head_dim=text.head_dim,
            theta=text.rope_theta,
            section=text.mrope_section,
            dtype=x_TD.dtype,
            yarn=text.yarn,
            use_kernel=self.use_kernel,
        )
        for i, layer in enumerate(self.layers):
            layer_input = self._layer_input(i, **hook_inputs)
            x_TD = self.step(layer, x_TD, rotary, forward_batch, forward_batch.layer_cache(i), layer_input)
        return self.norm(x_TD)

    def take_part(self, plan: DispatchPlan) -> None:
        """A step without any tokens of one's own: the experts here serve those of other ranks, layer by layer."""
        for layer in self.layers:
            if isinstance(layer.mlp, SparseMoe):
                layer.mlp.take_part(plan)

    def step(
        self,
        layer: nn.Module,
        x_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        forward_batch: ForwardBatch,
        cache: LayerCache | None,
        layer_input: Tensor | None,
    ) -> Tensor:
        """The region to compile: one layer and the hook."""
        return self._process_layer_output(layer(x_TD, rotary, forward_batch, cache), layer_input)

    def _layer_input(self, layer: int) -> Tensor | None:
        """What the hook gets after `layer`; None when it has nothing to do."""
        return None

    def _process_layer_output(self, x_TD: Tensor, layer_input: Tensor | None) -> Tensor:
        """The hook, after a layer's second residual add."""
        return x_TD


class Qwen3MoeForCausalLM(nn.Module):
    """Text-only language model: decoder and head."""

    model_class: type[Qwen3MoeModel] = Qwen3MoeModel

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = self.model_class(config)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size)
        if config.tie_word_embeddings:
            self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head be the embedding. To be called again after a load that replaces parameters."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        **hook_inputs: Any,
    ) -> Tensor:
        """Logits `[rows, V]`, model dtype, of the rows that `forward_batch` asks for. See `Qwen3MoeModel.forward`."""
        x_TD = self.model(input_ids, positions, forward_batch, input_embeds, **hook_inputs)
        return self.lm_head(forward_batch.select(x_TD))
