"""The vision tower: one image of each size, a batch of the smallest, eager and compiled, beside what is the least."""

from __future__ import annotations

from functools import partial

import torch

from qwen3vl_disagg.encode.worker import compile_tower
from tools import bench_ceilings
from tools.checkpoints import random_vision_model
from tools.gpu_steps.language import ceilings
from tools.gpu_steps.sizes import least_ms, sizes_of
from tools.gpu_steps.step import Check

TOGETHER = 8


@torch.inference_mode()
def images(check: Check) -> None:
    sizes, rates = sizes_of(check), ceilings(check)
    vision = sizes.config.vision
    model = random_vision_model(sizes.config, torch.bfloat16, check.device, 0)
    for is_compiled in (False, True) if sizes.compile else (False,):
        way = "compiled" if is_compiled else "eager"
        if is_compiled:
            with check.part("compile"):
                check.say(graphs=compile_tower(model.visual).graphs)
        for side, count in [*((side, 1) for side in sizes.sides), (sizes.sides[0], TOGETHER)]:
            with check.part(f"{way}_{side}_x{count}"):
                patches = side // (vision.patch_size * vision.spatial_merge_size) * vision.spatial_merge_size
                grid = (1, patches, patches)
                pixels = torch.randn(count * patches**2, vision.patch_dim, device=check.device, dtype=torch.bfloat16)
                work = partial(model.visual, pixels, [grid] * count)
                found = {"ms an image": least_ms(check, work, 5) / count}
                if rates is not None:
                    found["least ms"] = bench_ceilings.image(sizes.config, grid).seconds(rates) * 1e3
                check.say(**{f"{way}_{side}_x{count}": found})
