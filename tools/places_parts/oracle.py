"""Answers of `transformers`: its tokenizer, template, image processor and `generate`, greedy.

    python -m tools.places_parts.oracle --folder DIR --seed 1 --count 1000 --dtypes float32 bfloat16 --out FILE.json

Run as a process of its own: what asks the routes needs no `transformers`, and holds no second model.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tools.places_parts.answers import Answer, Answers, checkpoint_digest, write_answers
from tools.places_parts.questions import MAX_TOKENS, Question, digest, questions

TOP = 8
MAX_BATCH = 16


@dataclass(frozen=True)
class Prompt:
    """`ids` `[T]`; `pixels` `[P, patch_dim]` of all images; `grids` `[N, 3]`. `number`: the question's."""

    number: int
    ids: list[int]
    pixels: Tensor
    grids: Tensor

    @property
    def shape(self) -> tuple[int, list[list[int]]]:
        """Prompts of one shape make a batch without padding."""
        return len(self.ids), self.grids.tolist()


class Oracle:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.image: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.exact = self.load("float32")

    def load(self, dtype: str) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(
            self.folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        return model.eval()

    def prompt(self, number: int, question: Question) -> Prompt:
        opened = [Image.open(io.BytesIO(data)) for data in question.media]
        inputs = self.image(opened, return_tensors="pt")
        grids = inputs["image_grid_thw"]
        text = self.tokenizer.apply_chat_template(question.messages(), tokenize=False, add_generation_prompt=True)
        before, *after = text.split("<|image_pad|>")
        for grid, rest in zip(grids, after, strict=True):
            before += "<|image_pad|>" * (int(grid.prod()) // self.image.merge_size**2) + rest
        return Prompt(number, self.tokenizer(before)["input_ids"], inputs["pixel_values"], grids)

    @torch.inference_mode()
    def answer(self, model: Any, batch: Sequence[Prompt]) -> list[Answer]:
        """Of prompts of one shape."""
        inputs = self._inputs(model, batch)
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ends = set(model.generation_config.eos_token_id)
        logits_BTV = torch.stack(out.logits, dim=1)
        new_BT = out.sequences[:, inputs["input_ids"].shape[1] :]
        found = []
        for row, prompt in enumerate(batch):
            ids = _up_to_end(new_BT[row].tolist(), ends)
            logits_TV = logits_BTV[row, : len(ids)] if model is self.exact else self._exact_logits(prompt, ids)
            best = logits_TV.float().topk(TOP, dim=-1)
            tops = [
                list(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            found.append(Answer(self.tokenizer.decode(ids, skip_special_tokens=True), ids, tops))
        return found

    def _inputs(self, model: Any, batch: Sequence[Prompt], behind: Sequence[int] = ()) -> dict[str, Tensor]:
        ids_BT = torch.tensor([[*prompt.ids, *behind] for prompt in batch])
        # It keeps what the prompt before it had.
        model.model.rope_deltas = None
        return {
            "input_ids": ids_BT,
            "attention_mask": torch.ones_like(ids_BT),
            "mm_token_type_ids": (ids_BT == model.config.image_token_id).int(),
            "pixel_values": torch.cat([prompt.pixels for prompt in batch]).to(model.dtype),
            "image_grid_thw": torch.cat([prompt.grids for prompt in batch]),
        }

    def _exact_logits(self, prompt: Prompt, ids: Sequence[int]) -> Tensor:
        """`[len(ids), V]`: what float32 gives behind each beginning of an answer that is not its own."""
        inputs = self._inputs(self.exact, [prompt], ids[:-1])
        return self.exact(**inputs, use_cache=False).logits[0, len(prompt.ids) - 1 :]


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    """With the first end token, without what pads a batch behind it."""
    return ids[: next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))]


def batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    waiting: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: prompt.shape):
        if waiting and (prompt.shape != waiting[0].shape or len(waiting) == MAX_BATCH):
            yield waiting
            waiting = []
        waiting.append(prompt)
    if waiting:
        yield waiting


def answer_all(folder: Path, asked: Sequence[Question], dtypes: Sequence[str]) -> Answers:
    """In each of the dtypes."""
    oracle, found = Oracle(folder), dict[str, list[Answer]]()
    prompts = [oracle.prompt(number, question) for number, question in enumerate(asked)]
    for dtype in dtypes:
        model = oracle.exact if dtype == "float32" else oracle.load(dtype)
        answers: dict[int, Answer] = {}
        for batch in batches(prompts):
            answers |= zip((prompt.number for prompt in batch), oracle.answer(model, batch), strict=True)
            print(f"{dtype}: {len(answers)} of {len(asked)}", end="\r", file=sys.stderr, flush=True)
        found[dtype] = [answers[number] for number in range(len(asked))]
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    return Answers(checkpoint_digest(folder), digest(asked), versions, found)


def main(folder: Path, seed: int, count: int, dtypes: tuple[str, ...], out: Path) -> None:
    """Write the oracle's answers.

    Args:
        folder: the checkpoint.
        seed: of the questions.
        count: how many.
        dtypes: float32, bfloat16.
        out: the file.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_answers(out, answer_all(folder, list(questions(seed, count)), dtypes))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
