"""Small checkpoints that give vectors or scores, and what the reference makes of their prompts."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor
from transformers import AutoTokenizer

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.core.settings import Task
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.pooling_request import TASKS
from tests.support.fake_backend import FakeBackend, tiny_processor
from tests.support.oracle import image_processor, load_oracle
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint
from tools.training.make_tokenizer import SPECIAL_TOKENS, build_tokenizer

DENSE = RANDOM_PRESETS["tiny-random-dense"]
MODULES = {"embed": "models.Pooling", "rerank": "cross_encoder.modules.logit_score.LogitScore", "generate": ""}
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}'
    "<Query>:{query}\n<Document>:{document}<|im_end|>\n<|im_start|>assistant\n"
)
EMBED = "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
EMBED_DEFAULT = "Represent the user's input."
RERANK_DEFAULT = "Given a search query, retrieve relevant candidates that answer the query."
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def write_pooler(folder: Path, task: str, config: ModelConfig = DENSE) -> Path:
    """With the words yes and no in its vocabulary, and its task in modules.json."""
    write_random_checkpoint(folder, config, seed=7, min_pixels=1024, max_pixels=65536)
    first_special = config.vision_start_token_id - SPECIAL_TOKENS.index("<|vision_start|>")
    build_tokenizer(["yes\nno\n" * 1000, Path(__file__).read_text()], first_special, folder)
    kinds = ["models.Transformer", MODULES[task]] if MODULES[task] else ["models.Transformer"]
    modules = [{"idx": n, "path": "", "type": f"sentence_transformers.{kind}"} for n, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def pooling_processor(folder: Path, task: Task) -> Processor:
    write_pooler(folder, task)
    return Processor.from_folder(folder, read_config(folder))


class EachTask:
    """One application of all: a route goes to a model that it is for. `folder`: for their checkpoints."""

    def __init__(self, folder: Path, **options: Any) -> None:
        tasks: tuple[Task, ...] = ("embed", "rerank")
        made = {"generate": tiny_processor(), **{task: pooling_processor(folder / task, task) for task in tasks}}
        self.apps = {task: create_app(FakeBackend(), one, model_name="tiny", **options) for task, one in made.items()}

    def app_of(self, path: str) -> ASGIApp:
        return self.apps[TASKS.get(path.removeprefix("/v1/"), "generate")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app_of(scope["path"])(scope, receive, send)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_of(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


class Reference:
    """`transformers` with the published way to a vector and a score."""

    def __init__(self, folder: Path) -> None:
        self.model = load_oracle(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._images = image_processor(folder, "pillow")
        self._images.size = {"shortest_edge": 4096, "longest_edge": 65536}

    @torch.no_grad()
    def state(self, text: str, images: Sequence[Image.Image] = ()) -> Tensor:
        """The last token's final hidden state `[D]`."""
        visual = {}
        before, *after = text.split("<|image_pad|>")
        if images:
            visual = dict(self._images(list(images), return_tensors="pt"))
            for grid, rest in zip(visual["image_grid_thw"], after, strict=True):
                before += "<|image_pad|>" * (int(grid.prod()) // 4) + rest
        ids = torch.tensor([self.tokenizer(before)["input_ids"]])
        types = (ids == self.model.config.image_token_id).int()
        self.model.model.rope_deltas = None
        return self.model.model(input_ids=ids, mm_token_type_ids=types, **visual).last_hidden_state[0, -1]

    def vector(self, text: str, images: Sequence[Image.Image] = (), dimensions: int | None = None) -> Tensor:
        return torch.nn.functional.normalize(self.state(text, images)[:dimensions], p=2, dim=-1)

    def score(self, text: str, images: Sequence[Image.Image] = ()) -> float:
        words, head = self.tokenizer.get_vocab(), self.model.lm_head.weight.detach()
        return float(torch.sigmoid(self.state(text, images) @ (head[words["yes"]] - head[words["no"]])))
