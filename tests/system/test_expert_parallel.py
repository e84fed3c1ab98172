"""Experts over Gloo ranks under torchrun against `transformers`: prefill and decode, both ways for rows to travel."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qwen3vl_disagg import LLM
from qwen3vl_disagg.checkpoint import load_language_model
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.expert_rank import KINDS, no_plans, run_prompt, send_all_to_the_same_experts
from tests.support.oracle import load_oracle, relative_error
from tests.support.scenes import ask_scenes
from tests.support.server import REPO, Server, free_port
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint

COUNTS = (7, 8, 12, 16)
NUM_DECODE = 3


@pytest.mark.parametrize(
    ("num_ranks", "held"),
    [
        (5, {7: [2, 2, 2, 1, 0], 8: [2, 2, 2, 2, 0], 12: [3, 3, 3, 3, 0], 16: [4, 4, 4, 4, 0]}),
        pytest.param(3, {7: [3, 3, 1], 8: [3, 3, 2], 12: [4] * 3, 16: [6, 6, 4]}, marks=pytest.mark.acceptance),
    ],
)
@torch.inference_mode()
def test_logits_are_those_of_the_oracle(tmp_path, num_ranks, held):
    """Fewer prompts than ranks, so that some never have a token; 5 ranks: the last one has no expert of any."""
    config = RANDOM_PRESETS["tiny-random"]
    for count in COUNTS:
        text = replace(config.text, num_experts=count, num_experts_per_tok=3, num_hidden_layers=3)
        write_random_checkpoint(tmp_path / str(count), replace(config, text=text), seed=count)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 270, (length,), generator=generator).tolist() for length in (9, 17, 5)[: num_ranks - 1]]
    work = {"checkpoints": [str(count) for count in COUNTS], "prompts": prompts, "num_decode": NUM_DECODE}
    (tmp_path / "work.json").write_text(json.dumps(work))
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    torchrun += [f"--master-port={free_port()}", "-m", "tests.support.expert_rank", str(tmp_path)]
    subprocess.run(torchrun, cwd=REPO, check=True, timeout=150, capture_output=True)
    results = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(num_ranks)]
    worst = 0.0
    for count in COUNTS:
        assert [int(result[f"{count}/held"]) for result in results] == held[count]
        oracle, whole = load_oracle(tmp_path / str(count)), load_language_model(tmp_path / str(count))
        skewed = load_language_model(tmp_path / str(count))
        send_all_to_the_same_experts(skewed)
        for number, ids in enumerate(prompts):
            theirs = oracle(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            same_experts = run_prompt(skewed, ids, NUM_DECODE, no_plans())
            assert relative_error(run_prompt(whole, ids, NUM_DECODE, no_plans()), theirs) < 1e-5
            for kind in KINDS:
                result = results[number % num_ranks]
                errors = (
                    relative_error(result[f"{count}/False/{kind}/{number}"], theirs),
                    relative_error(result[f"{count}/True/{kind}/{number}"], same_experts),
                )
                worst = max(worst, *errors)
                assert max(errors) < 1e-5, (count, kind, number, errors)
    rows_by_either_way_are_the_same(results)
    print(f"{num_ranks} ranks, {COUNTS} experts: relative error at most {worst:.1e}")


def rows_by_either_way_are_the_same(results: list[dict[str, torch.Tensor]]) -> None:
    """NCCL's branch, over Gloo: whole numbers, whose sums are exact in any order."""
    kinds = [key.removeprefix("sent/") for key in results[0] if key.startswith("sent/")]
    assert len(kinds) == 8
    for kind in kinds:
        sent = [result[f"sent/{kind}"] for result in results]
        pieces = sum(rows.float() for rows in sent).to(sent[0].dtype).chunk(len(results))
        for rank, result in enumerate(results):
            assert torch.equal(result[f"gathered/{kind}"], torch.cat(sent)), kind
            assert torch.equal(result[f"scattered/{kind}"], pieces[rank]), kind


@pytest.mark.acceptance
@pytest.mark.timeout(400)
def test_compiled_steps_over_ranks_are_the_predicted_graphs_and_none_more(tmp_path, monkeypatch):
    """A recompilation would be an error; text alone has graphs without a level."""
    monkeypatch.setenv("Q3VL_GRAPHS", "fail")
    asked = ask_scenes(tmp_path, seed=11, count=40)
    expected = LLM().chat([entry.messages() for entry in asked], SamplingParams(max_new_tokens=64))
    with Server(4, "--encode-ranks", "1", "--compile", "on", ready_s=300) as server, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda entry: server.chat(entry.content()), asked))
        text = [server.chat("Tell me " + "more and " * count) for count in (1, 30, 200)]
    for (status, answer), mine in zip(answers, expected, strict=True):
        assert status == 200, answer
        assert answer["choices"][0]["token_ids"] == mine.token_ids
    assert [status for status, _ in text] == [200] * 3
    lines = [line for line in server.output().splitlines() if "graphs:" in line]
    assert sorted(lines) == [f"language rank {rank}: graphs: 4 of 4, breaks: 0" for rank in (1, 2, 3)]
