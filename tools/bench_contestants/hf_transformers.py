"""`transformers`, through `generate` and `get_image_features`, with the attention and experts it picks itself."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, StoppingCriteria, StoppingCriteriaList

from tools.bench_contestants.worker import Setup, serve


class Stamps(StoppingCriteria):
    """Never stops; notes when each step's tokens were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Transformers:
    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self.device = torch.device(setup.device)
        if setup.is_random:
            config = AutoConfig.from_pretrained(setup.folder)
            with self.device:
                model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype)
        else:
            model = AutoModelForImageTextToText.from_pretrained(setup.folder, dtype="auto")
        self.model = torch.nn.Module.to(model, self.device).eval()
        self.model.generation_config.eos_token_id = None

    def facts(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attention": config._attn_implementation,
            "experts": getattr(config.text_config, "_experts_implementation", "unknown"),
        }

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        input_ids, stamps = torch.tensor(prompts, device=self.device), Stamps()
        self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )
        return [stamps.times] * len(prompts)

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        return self.decode([prompt], 1)[0][0] - started

    @torch.inference_mode()
    def vision(self, grid: tuple[int, int, int], patch_dim: int, seed: int) -> float:
        patches = torch.randn(grid[0] * grid[1] * grid[2], patch_dim, generator=torch.Generator().manual_seed(seed))
        started = time.perf_counter()
        self.model.get_image_features(patches.to(self.device), torch.tensor([grid], device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(Transformers)
