"""DeepStack: features of shallow vision layers, added to the first decoder layers at the visual tokens.

Level i is added after decoder layer i, for i < n, whatever tower block it came from. Travelling and inside the model
the n levels stand side by side: `[T, n * D]`, level i in columns `i * D : (i + 1) * D`, zeros at text rows, so the hook
is one dense add.
"""

from __future__ import annotations

from torch import Tensor

from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.model.decoder import Qwen3MoeForCausalLM, Qwen3MoeModel


def separate_deepstack(embeds: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """`[rows, (1 + n) * D]` -> main `[rows, D]` and deepstack `[rows, n * D]`, both contiguous."""
    if embeds.dim() != 2 or embeds.shape[1] < hidden_size or embeds.shape[1] % hidden_size:
        raise ValueError(f"embeddings {tuple(embeds.shape)} are not a multiple of hidden size {hidden_size} wide")
    return embeds[:, :hidden_size].contiguous(), embeds[:, hidden_size:].contiguous()


class Qwen3MoeModelWithDeepStack(Qwen3MoeModel):
    """The decoder with the hook filled in. `input_deepstack_embeds` is `[T, n * D]`, or None without visual rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.num_deepstack_levels = config.num_deepstack_levels

    def _layer_input(self, layer: int, input_deepstack_embeds: Tensor | None = None) -> Tensor | None:
        if input_deepstack_embeds is None or layer >= self.num_deepstack_levels:
            return None
        hidden = self.config.hidden_size
        width = self.num_deepstack_levels * hidden
        if input_deepstack_embeds.shape[1] != width:
            raise ValueError(f"DeepStack rows are {input_deepstack_embeds.shape[1]} wide, expected {width}")
        return input_deepstack_embeds[:, layer * hidden : (layer + 1) * hidden]

    def _process_layer_output(self, x_TD: Tensor, layer_input: Tensor | None) -> Tensor:
        return x_TD if layer_input is None else x_TD + layer_input.to(x_TD.dtype)


# The decoder inside the whole model injects the same dense rows, so the two names are one class.
Qwen3MoeLLMModel = Qwen3MoeModelWithDeepStack


class Qwen3MoeForCausalLMWithDeepStack(Qwen3MoeForCausalLM):
    """What a language rank runs: `forward` takes `input_deepstack_embeds=None` besides what the base takes."""

    model_class = Qwen3MoeModelWithDeepStack
