"""What is added to vLLM's worker class (`worker_extension_cls`) to time its vision tower where it lives."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.forward_context import set_forward_context  # type: ignore[import-not-found]


class TowerTimer:
    model_runner: Any
    vllm_config: Any

    @torch.inference_mode()
    def time_tower(self, grid: list[int], patch_dim: int, seed: int) -> float:
        """Seconds of the tower over one image of noise."""
        model = self.model_runner.get_model()
        patches = torch.randn(grid[0] * grid[1] * grid[2], patch_dim, generator=torch.Generator().manual_seed(seed))
        started = time.perf_counter()
        with set_forward_context(None, self.vllm_config):
            pixels = patches.to(model.visual.device, model.visual.dtype)
            model.embed_multimodal(pixel_values=pixels, image_grid_thw=torch.tensor([grid]))
        if pixels.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started
