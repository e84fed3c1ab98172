"""lm-eval: a task of generation, and one of multiple choice, whose sums of log probabilities are compared with those
that transformers has of the same checkpoint."""

from __future__ import annotations

import json
import os
import random
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tools.acceptance.checks import FOLDER, MODEL, URL, run

TASKS, COUNT, TOLERANCE = Path("tasks").resolve(), 20, 1e-4
THINGS = [f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "cross")]
COMMON = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {TASKS}/questions.jsonl
test_split: test
doc_to_text: "{{{{question}}}}"
"""
KINDS = {
    "choice": """task: choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
""",
    "generate": """task: generate
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 16
metric_list:
  - metric: exact_match
""",
}


def prepare() -> None:
    TASKS.mkdir()
    source, rows = random.Random(1), []
    for number in range(COUNT):
        first, second = source.sample(THINGS, 2)
        text = f"{number}. There is a {first} above a {second}. What is below the {first}?\nAnswer:"
        rows.append(json.dumps({"question": text, "choices": [second, first, "nothing", "12"], "answer": 0}))
    (TASKS / "questions.jsonl").write_text("\n".join(rows))
    for name, text in KINDS.items():
        (TASKS / f"{name}.yaml").write_text(text + COMMON)


@cache
def samples(task: str, model: str, route: str, *options: str) -> list[dict[str, Any]]:
    """What lm-eval logs of each question."""
    args = f"model={MODEL},base_url={URL}{route},tokenizer={FOLDER},num_concurrent=4,max_retries=1,max_length=2048"
    command = ["lm_eval", "run", "--model", model, "--model_args", args, "--tasks", task, "--include_path", str(TASKS)]
    command += ["--output_path", "results", "--log_samples", *options]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2500:])
    [file] = Path("results").rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def choices() -> list[dict[str, Any]]:
    return samples("choice", "local-completions", "/completions")


def generated() -> list[dict[str, Any]]:
    return samples("generate", "local-chat-completions", "/chat/completions", "--apply_chat_template")


def same_sums() -> bool:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    differences = []
    for sample in choices():
        for asked, [[told, is_greedy]] in zip(sample["arguments"].values(), sample["resps"], strict=True):
            start = len(tokenizer(asked["arg_0"]).input_ids)
            ids = tokenizer(asked["arg_0"] + asked["arg_1"], return_tensors="pt").input_ids
            with torch.no_grad():
                logprobs_TV = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            ends_T = ids[0, start:]
            differences.append(abs(float(told) - float(logprobs_TV.gather(1, ends_T[:, None]).sum())))
            assert (str(is_greedy) == "True") == bool((logprobs_TV.argmax(-1) == ends_T).all()), sample
    print(f"{len(differences)} sums, {max(differences):.1e} apart at most")
    return len(differences) == 4 * COUNT and max(differences) < TOLERANCE


prepare()
run(
    {
        "generation task": lambda: len(generated()) == COUNT,
        "multiple choice": lambda: len(choices()) == COUNT,
        "multiple choice = transformers": same_sums,
    }
)
