"""One rank of `bench.py parallel`: times steps of a decoder whose experts are spread over ranks; JSON to a file."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwen3vl_disagg.checkpoint import load_language_model
from qwen3vl_disagg.core.tensors import lazy_zeros
from qwen3vl_disagg.model import PagedBatch, Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.moe import DispatchPlan, Experts
from qwen3vl_disagg.parallel.collectives import GroupCollectives
from qwen3vl_disagg.parallel.dispatch import ExpertDispatcher
from qwen3vl_disagg.parallel.expert_parallel import ExpertShards, mesh_collectives
from qwen3vl_disagg.parallel.lockstep import Lockstep, Outlook, PaceLimits, PeerHello, StepPlan
from qwen3vl_disagg.parallel.lockstep_link import Gathering, LockstepClient, LockstepServer, say_hello
from qwen3vl_disagg.parallel.sizes import padded_rows
from qwen3vl_disagg.transport.gloo import expert_mesh

KINDS = ("gather", "all_to_all")
CONTEXT = 256
PAGE = 16
JOIN_S = 120.0


@dataclass(frozen=True)
class Scenario:
    """Tokens of a step on all ranks together. `where`: divided over them, or all on the first. A prompt is one
    sequence; decoded tokens have one each."""

    name: str
    tokens: int
    is_prompt: bool
    where: str

    def tokens_of(self, rank: int, size: int) -> int:
        if self.where == "first":
            return self.tokens if rank == 0 else 0
        return self.tokens // size + (rank < self.tokens % size)


class Counted(GroupCollectives):
    """Adds up the bytes that leave for other ranks."""

    num_bytes = 0

    def all_to_all(self, x_SC: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self.num_bytes += (sum(send) - send[self.rank]) * x_SC.shape[1] * x_SC.itemsize
        return super().all_to_all(x_SC, send, receive)


class CountedDispatcher(ExpertDispatcher):
    """Also the least that could leave: each row once to each other rank that has one of its experts, and a sum back."""

    def __init__(self, collectives: Counted, num_experts: int) -> None:
        super().__init__(collectives, num_experts)
        self.rank, self.least = collectives.rank, 0

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, plan: DispatchPlan | None) -> Any:
        for ranks in (ids_TK // self._chunk).tolist():
            self.least += 2 * len(set(ranks) - {self.rank}) * x_TD.shape[1] * x_TD.itemsize
        return super().dispatch(x_TD, weights_TK, ids_TK, plan)


class Rank:
    """A rank's model and its key-value pools."""

    def __init__(self, folder: Path, rank: int, size: int, store: Path, max_sequences: int) -> None:
        self.rank, self.size, self.mesh = rank, size, None
        shards = None
        if size > 1:
            self.store = dist.FileStore(str(store), size)
            device = torch.device("cpu")
            self.mesh = expert_mesh(self.store, rank, size, host="127.0.0.1", device=device, timeout_s=JOIN_S)
            shards = ExpertShards(self.mesh)
        self.model: Qwen3MoeForCausalLMWithDeepStack = load_language_model(folder, shards=shards)
        text = self.model.config.text
        slots = (max_sequences * (CONTEXT // PAGE) + 64) * PAGE
        shape = (slots, text.num_key_value_heads, text.head_dim)
        device = torch.device("cpu")
        dtype = self.model.model.embed_tokens.weight.dtype
        self.caches = [
            (lazy_zeros(shape, dtype, device), lazy_zeros(shape, dtype, device)) for _ in range(text.num_hidden_layers)
        ]

    def step(self, scenario: Scenario, kind: str | None) -> None:
        """One step of the decoder, all ranks together."""
        count = scenario.tokens_of(self.rank, self.size)
        most = max(scenario.tokens_of(rank, self.size) for rank in range(self.size))
        plan = None if kind is None else DispatchPlan(padded_rows(most), kind)  # type: ignore[arg-type]
        if count == 0:
            if plan is not None:
                self.model.model.take_part(plan)
            return
        lens = [count] if scenario.is_prompt else [1] * count
        contexts = [CONTEXT + count if scenario.is_prompt else CONTEXT] * len(lens)
        width = -(-contexts[0] // PAGE)
        tables = torch.arange(len(lens) * width).view(len(lens), width)
        batch = PagedBatch(lens, contexts, tables, PAGE, self.caches)
        batch.dispatch_plan = plan
        ids = (torch.arange(count) * 7919 + self.rank) % (self.model.config.text.vocab_size - 20)
        self.model(ids, torch.arange(count).expand(3, -1) + CONTEXT - count, batch)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def times(self, scenario: Scenario, kind: str | None, rounds: int) -> list[float]:
        """Seconds of each step, from a barrier to the end on this rank."""
        seconds = []
        for _ in range(rounds + 2):
            self.barrier()
            started = time.perf_counter()
            self.step(scenario, kind)
            seconds.append(time.perf_counter() - started)
        return seconds[2:]

    def agreement(self, rounds: int) -> list[float]:
        """Seconds from this rank's word about a step to its plan, as a language rank has them: the loop on one thread,
        the engine on another."""
        return asyncio.run(self._agree(rounds + 5))[5:]

    async def _agree(self, rounds: int) -> list[float]:
        limits, server = PaceLimits(64, 4096), None
        if self.rank == 0:
            sock = socket.create_server(("127.0.0.1", 0))
            gathering = Gathering(sock, token="bench")
            server = LockstepServer(Lockstep(self.size, limits, lambda rows, num_rows: "gather"))
            self.store.set("lockstep", str(sock.getsockname()[1]))
        address = ("127.0.0.1", int(self.store.get("lockstep")))
        line = say_hello(address, PeerHello(token="bench", rank=self.rank))
        if server is not None:
            server.serve(await gathering.all(self.size, JOIN_S))
        client = await LockstepClient.join(line)
        plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
        client.on_plan = plans.put
        running = asyncio.create_task(client.run())

        def ask() -> list[float]:
            seconds = []
            for step in range(1, rounds + 1):
                started = time.perf_counter()
                client.report(Outlook(step=step, decode=1))
                plans.get(timeout=JOIN_S)
                seconds.append(time.perf_counter() - started)
            return seconds

        seconds = await asyncio.to_thread(ask)
        await client.leave(JOIN_S)
        await running
        await client.close()
        if server is not None:
            await server.close()
        return seconds

    def traffic(self, scenario: Scenario, kind: str) -> tuple[int, int]:
        """(bytes that leave this rank in a step, the least that could)."""
        if self.mesh is None:
            return 0, 0
        plain = mesh_collectives(self.mesh)
        counted = Counted(plain._group_name, plain.rank, plain.num_ranks, has_native=False)
        experts = [part for part in self.model.modules() if isinstance(part, Experts)]
        before = [part.dispatcher for part in experts]
        counting = [CountedDispatcher(counted, part.gate_up_proj.shape[0]) for part in experts]
        for part, dispatcher in zip(experts, counting, strict=True):
            part.dispatcher = dispatcher
        self.step(scenario, kind)
        for part, usual in zip(experts, before, strict=True):
            part.dispatcher = usual
        return counted.num_bytes, sum(dispatcher.least for dispatcher in counting)


@torch.inference_mode()
def main(folder: str, rank: int, size: int, store: str, out: str, rounds: int, scenarios: Sequence[Scenario]) -> None:
    """Every scenario with each kind of dispatch in turn."""
    torch.set_num_threads(1)
    mine = Rank(Path(folder), rank, size, Path(store), max(s.tokens for s in scenarios if not s.is_prompt))
    kinds: tuple[str | None, ...] = KINDS if size > 1 else (None,)
    results = []
    for scenario in scenarios:
        seconds: dict[str | None, list[float]] = {kind: [] for kind in kinds}
        for _ in range(3):
            for kind in kinds:
                seconds[kind] += mine.times(scenario, kind, -(-rounds // 3))
        for kind in kinds:
            sent, least = mine.traffic(scenario, kind) if kind else (0, 0)
            entry = {**asdict(scenario), "kind": kind, "seconds": seconds[kind], "bytes": sent, "least": least}
            results.append(entry)
    if size > 1:
        agreement = Scenario("agreement on a step", 1, False, "first")
        seconds_of = mine.agreement(10 * rounds)
        results.append({**asdict(agreement), "kind": None, "seconds": seconds_of, "bytes": 0, "least": 0})
    Path(out).write_text(json.dumps(results))
    mine.barrier()
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    main(**{**job, "scenarios": [Scenario(**scenario) for scenario in job["scenarios"]]})
