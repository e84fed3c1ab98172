"""The whole model in one module: what one trains, reads, and compares the split system with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwen3vl_disagg.model.attention import ForwardBatch
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.model.deepstack import Qwen3MoeForCausalLMWithDeepStack, separate_deepstack
from qwen3vl_disagg.model.vision import Grid, VisionTower


def splice_visual(
    input_ids: Tensor, text_embeds: Tensor, visual_token_ids: Sequence[int], main: Tensor, deepstack: Tensor
) -> tuple[Tensor, Tensor]:
    """Put visual rows where their placeholders stand.

    Args:
        input_ids: `[T]`. text_embeds: `[T, h]`. main: `[rows, h]`. deepstack: `[rows, n * h]`, in prompt order.

    Returns:
        input_embeds `[T, h]` and input_deepstack_embeds `[T, n * h]` with zeros at text rows.
    """
    is_visual = torch.isin(input_ids, torch.tensor(visual_token_ids, device=input_ids.device))
    where = is_visual.nonzero().squeeze(1)
    if len(where) != len(main):
        raise ValueError(f"{len(where)} visual placeholders in the prompt but {len(main)} visual rows")
    embeds = text_embeds.index_copy(0, where, main.to(text_embeds.dtype))
    dense = torch.zeros(len(input_ids), deepstack.shape[1], dtype=text_embeds.dtype, device=text_embeds.device)
    return embeds, dense.index_copy(0, where, deepstack.to(text_embeds.dtype))


class Qwen3VLMoeForConditionalGeneration(nn.Module):
    """Vision tower and decoder. With `language_model=False` the tower alone: what an encode rank holds."""

    def __init__(self, config: ModelConfig, language_model: bool = True) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.language_model = Qwen3MoeForCausalLMWithDeepStack(config) if language_model else None

    def get_image_feature(self, pixels: Tensor, grid_thw: Tensor | Sequence[Grid]) -> Tensor:
        """`[rows, (1 + n) * h]`: the main row and the n DeepStack rows of each visual token, side by side."""
        main, levels = self.visual(pixels, grid_thw)
        return torch.cat([main, *levels], dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | Sequence[Grid] | None = None,
    ) -> Tensor:
        """Logits of the rows that `forward_batch` asks for. See `Qwen3MoeModel.forward`.

        `pixel_values` `[P, patch_dim]` and `image_grid_thw` `[items, 3]` hold all images and videos in prompt order.
        """
        if self.language_model is None:
            raise ValueError("this model was built with language_model=False: it has a vision tower only")
        if pixel_values is None:
            return self.language_model(input_ids, positions, forward_batch, input_embeds)
        if image_grid_thw is None:
            raise ValueError("pixel_values need image_grid_thw")
        if input_embeds is None:
            input_embeds = self.language_model.model.embed_tokens(input_ids)
        main, deepstack = separate_deepstack(
            self.get_image_feature(pixel_values, image_grid_thw), self.config.text.hidden_size
        )
        visual_ids = (self.config.image_token_id, self.config.video_token_id)
        embeds, dense = splice_visual(input_ids, input_embeds, visual_ids, main, deepstack)
        return self.language_model(input_ids, positions, forward_batch, embeds, input_deepstack_embeds=dense)
