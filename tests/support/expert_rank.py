"""One of several ranks that share the experts of random checkpoints, over Gloo: run under torchrun by a test.

Rank r runs the prompts `prompts[r::n]` of each checkpoint, one per step, prefill and then a few tokens of decoding, and
writes the logits; in other steps it has no token. Usage: expert_rank.py FOLDER, which holds `work.json`.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qwen3vl_disagg.checkpoint import load_language_model
from qwen3vl_disagg.model import PagedBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.moe import DispatchPlan, SparseMoe
from qwen3vl_disagg.parallel.collectives import GroupCollectives
from qwen3vl_disagg.parallel.expert_parallel import ExpertShards, mesh_collectives
from qwen3vl_disagg.transport.gloo import expert_mesh

PAGE = 4
KINDS = ("gather", "all_to_all")


def run_prompt(model: Qwen3MoeForCausalLMWithDeepStack, ids: list[int], num_decode: int, plans) -> Tensor:
    """Logits `[T, V]` of all tokens but the last `num_decode` in one step, and of these one by one.

    `plans` gives the plan of each step, None where nobody else takes part.
    """
    text = model.config.text
    shape = (-(-len(ids) // PAGE) * PAGE, text.num_key_value_heads, text.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(text.num_hidden_layers)]
    tables = torch.arange(shape[0] // PAGE)[None]
    logits, stops = [], [len(ids) - num_decode, *range(len(ids) - num_decode + 1, len(ids) + 1)]
    for start, stop in zip([0, *stops], stops, strict=False):
        batch = PagedBatch([stop - start], [stop], tables, PAGE, caches, last_only=False, impl="sdpa")
        batch.dispatch_plan = next(plans)
        positions = torch.arange(start, stop).expand(3, -1)
        logits.append(model(torch.tensor(ids[start:stop]), positions, batch))
    return torch.cat(logits)


def no_plans():
    while True:
        yield None


def send_all_to_the_same_experts(model: Qwen3MoeForCausalLMWithDeepStack) -> None:
    """A router that sees no difference takes the same experts for every token."""
    for part in model.modules():
        if isinstance(part, SparseMoe):
            part.gate.weight.zero_()


def both_ways(mesh: DeviceMesh) -> dict[str, Tensor]:
    """What rows come out as by the group's own collectives, as NCCL has them, and by exchanges, as Gloo's are used."""
    found = {}
    ours = mesh_collectives(mesh)
    for has_native in (False, True):
        group = GroupCollectives(mesh.get_group().group_name, ours.rank, ours.num_ranks, has_native=has_native)
        for dtype in (torch.float32, torch.bfloat16):
            for num_rows in (1, 6):
                generator = torch.Generator().manual_seed(100 * ours.rank + num_rows)
                x_SC = torch.randint(-40, 40, (num_rows * ours.num_ranks, 5), generator=generator).to(dtype)
                key = f"{dtype}/{num_rows}/{has_native}"
                found[f"gathered/{key}"] = group.all_gather(x_SC)
                found[f"scattered/{key}"] = group.reduce_scatter(x_SC)
                found[f"sent/{key}"] = x_SC
    return found


@torch.inference_mode()
def main(folder: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    work = json.loads((folder / "work.json").read_text())
    store = dist.FileStore(str(folder / "store"), size)
    store.set_timeout(timedelta(seconds=60))
    mesh = expert_mesh(store, rank, size, host="127.0.0.1", device=torch.device("cpu"), timeout_s=60)
    prompts, num_decode = work["prompts"], work["num_decode"]
    longest = max(map(len, prompts))
    results = {}
    for name in work["checkpoints"]:
        model = load_language_model(folder / name, shards=ExpertShards(mesh))
        for is_skewed in (False, True):
            if is_skewed:
                send_all_to_the_same_experts(model)
            for kind in KINDS:
                mine = [DispatchPlan(longest, kind), *[DispatchPlan(2, kind)] * num_decode]
                for number, ids in enumerate(prompts):
                    if number % size == rank:
                        key = f"{name}/{is_skewed}/{kind}/{number}"
                        results[key] = run_prompt(model, ids, num_decode, iter(mine)).contiguous()
                    elif number % size < len(prompts):
                        for plan in mine:
                            model.model.take_part(plan)
        results[f"{name}/held"] = torch.tensor(model.model.layers[0].mlp.experts.down_proj.to_local().shape[0])
    results |= both_ways(mesh)
    save_file(results, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
