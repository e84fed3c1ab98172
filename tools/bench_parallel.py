"""What spreading the experts costs: a step against the number of ranks, bytes on the wire, tokens per expert.

Ranks share the machine's cores, so more ranks do not get more of them: the figures are what lockstep and dispatch cost,
not what more machines would gain.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from qwen3vl_disagg import LLM
from qwen3vl_disagg.assets.scenes import write
from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.model.moe import SparseMoe, route
from qwen3vl_disagg.parallel.expert_placement import shard_rows
from tools.bench_machine import machine_facts, table
from tools.bench_parallel_rank import Scenario

RUN_S = 900.0
SCENARIOS = (
    Scenario("decode, 12 sequences", 12, False, "all"),
    Scenario("decode, 1 sequence", 1, False, "first"),
    Scenario("chunk of 64 on one rank", 64, True, "first"),
    Scenario("prompt of 512 on one rank", 512, True, "first"),
    Scenario("prompts of 512 in all", 512, True, "all"),
)


def parallel(
    *,
    model: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    ranks: tuple[int, ...] = (1, 2, 3, 6),
    rounds: int = 15,
    scenes: int = 24,
    json_only: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Steps of a decoder whose experts are spread over ranks, over Gloo on this machine.

    Args:
        model: checkpoint folder; the small one inside the package without it.
        ranks: numbers of language ranks to compare; 1 has all experts and no dispatch.
        rounds: steps of each kind; medians of the slowest rank's time are shown.
        scenes: drawn scenes to answer for the tokens per expert; 0: leave it out.
        json_only: print nothing but one JSON object.
    """
    folder = resolve_model_folder(None if model is None else str(model))
    steps = [entry for size in ranks for entry in run_ranks(folder, size, rounds)]
    loads = expert_loads(folder, scenes, ranks) if scenes else None
    if not json_only:
        print(report(folder, steps, loads))
    print(json.dumps({"machine": machine_facts(), "model": folder.name, "steps": steps, "loads": loads}))


def run_ranks(folder: Path, size: int, rounds: int) -> list[dict[str, Any]]:
    """Start `size` ranks; one entry for each scenario and kind: milliseconds of the slowest rank, bytes of all."""
    with tempfile.TemporaryDirectory(prefix="bench-parallel-") as name:
        outs = [Path(name) / f"{rank}.json" for rank in range(size)]
        job: dict[str, Any] = {"folder": str(folder), "size": size, "store": f"{name}/store", "rounds": rounds}
        job["scenarios"] = [asdict(scenario) for scenario in SCENARIOS]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tools.bench_parallel_rank", json.dumps({**job, "rank": rank, "out": str(out)})],
                cwd=Path(__file__).resolve().parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank, out in enumerate(outs)
        ]
        end = time.monotonic() + RUN_S
        try:
            statuses = [process.wait(max(0.1, end - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(statuses):
            raise SystemExit(f"{size} ranks: exit statuses {statuses}")
        found = [json.loads(out.read_text()) for out in outs]
    text = read_config(folder).text
    layers = sum(text.is_moe_layer(i) for i in range(text.num_hidden_layers))
    entries = []
    for of_ranks in zip(*found, strict=True):
        first = of_ranks[0]
        slowest = [max(times) for times in zip(*(entry["seconds"] for entry in of_ranks), strict=True)]
        entries.append(
            {
                "ranks": size,
                "step": first["name"],
                "kind": first["kind"],
                "ms": 1e3 * statistics.median(slowest),
                "least_ms": 1e3 * min(slowest),
                "bytes": sum(entry["bytes"] for entry in of_ranks) / (first["tokens"] * layers),
                "least_bytes": sum(entry["least"] for entry in of_ranks) / (first["tokens"] * layers),
            }
        )
    return entries


@torch.inference_mode()
def expert_loads(folder: Path, scenes: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Tokens per expert over the answers to drawn scenes, and what that makes of ranks."""
    llm = LLM(folder)
    layers = [layer.mlp for layer in llm.engine.runner.model.model.layers if isinstance(layer.mlp, SparseMoe)]
    counts_LE = torch.zeros(len(layers), llm.config.text.num_experts, dtype=torch.int64)

    def count(number: int, num_choices: int) -> Any:
        def hook(_module: Any, _inputs: Any, logits_TE: torch.Tensor) -> None:
            ids = route(logits_TE, num_choices)[1].flatten()
            counts_LE[number] += torch.bincount(ids, minlength=counts_LE.shape[1])

        return hook

    for number, moe in enumerate(layers):
        moe.gate.register_forward_hook(count(number, moe.num_experts_per_tok))
    with tempfile.TemporaryDirectory(prefix="scenes-") as name:
        write(4242, scenes, Path(name))
        for question in map(json.loads, (Path(name) / "questions.jsonl").read_text().splitlines()):
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": str(Path(name) / image)}} for image in question["images"]
            ]
            content = [*parts, {"type": "text", "text": question["question"]}]
            llm.chat([[{"role": "user", "content": content}]], SamplingParams(max_new_tokens=64))
    share_LE = counts_LE / counts_LE.float().mean(1, keepdim=True)
    spread = {}
    for size in ranks:
        held = [shard_rows(counts_LE.shape[1], size, rank) for rank in range(size)]
        tokens_LN = torch.stack([counts_LE[:, rows.start : rows.stop].sum(1) for rows in held], dim=1).float()
        spread[size] = float((tokens_LN.max(1).values / tokens_LN.mean(1)).mean())
    return {
        "tokens": int(counts_LE[0].sum()) // layers[0].num_experts_per_tok,
        "busiest": [float(value) for value in share_LE.max(1).values],
        "idlest": [float(value) for value in share_LE.min(1).values],
        "busiest_rank": spread,
    }


def report(folder: Path, steps: list[dict[str, Any]], loads: dict[str, Any] | None) -> str:
    facts = machine_facts()
    head = f"{folder.name}; {facts['cores']} cores of {facts['cpu']}, torch {facts['torch']}, {facts['date']}"
    alone = {entry["step"]: entry["ms"] for entry in steps if entry["ranks"] == 1}
    rows = []
    for entry in steps:
        base = alone.get(entry["step"])
        rows.append(
            [
                entry["step"],
                str(entry["ranks"]),
                (entry["kind"] or ("all here" if entry["ranks"] == 1 else "")).replace("_", "-"),
                f"{entry['ms']:.2f}" if entry["ms"] < 3 else f"{entry['ms']:.0f}",
                f"{entry['ms'] / base:.2f}" if base else "",
                f"{entry['bytes']:,.0f}" if entry["kind"] else "",
                f"{entry['least_bytes']:,.0f}" if entry["kind"] else "",
            ]
        )
    names = [entry["step"] for entry in steps if entry["ranks"] == max(e["ranks"] for e in steps)]
    rows.sort(key=lambda row: names.index(row[0]))
    text = table(["step", "ranks", "dispatch", "ms", "x 1 rank", "bytes / token and layer", "least"], rows)
    if loads is None:
        return f"{head}\n\n{text}\n"
    busiest, idlest = (", ".join(f"{value:.2f}" for value in loads[name]) for name in ("busiest", "idlest"))
    ranks = ", ".join(f"{size}: {value:.2f}" for size, value in loads["busiest_rank"].items())
    return (
        f"{head}\n\n{text}\n\nTokens per expert over {loads['tokens']} tokens, times the mean, layer by layer: "
        f"busiest {busiest}; idlest {idlest}.\nBusiest rank over the mean of ranks, mean over layers: {ranks}.\n"
    )
