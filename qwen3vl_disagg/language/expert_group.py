"""The language ranks as one model: how they find one another, before any weights are loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import msgspec
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qwen3vl_disagg.checkpoint import decoder_digest
from qwen3vl_disagg.cluster.hub_client import find_store, tell_store
from qwen3vl_disagg.cluster.rank_setup import RankSetup
from qwen3vl_disagg.cluster.registry import check_fingerprint
from qwen3vl_disagg.cluster.rendezvous import host_id
from qwen3vl_disagg.core.devices import resolve_compile
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.kernels.build import load
from qwen3vl_disagg.model.moe import DispatchKind
from qwen3vl_disagg.parallel.dispatch import choose_kind
from qwen3vl_disagg.parallel.expert_parallel import ExpertShards
from qwen3vl_disagg.parallel.lockstep import Lockstep, PaceLimits, PeerHello
from qwen3vl_disagg.parallel.lockstep_link import Gathering, Line, LockstepClient, LockstepServer, say_hello
from qwen3vl_disagg.transport.gloo import expert_mesh
from qwen3vl_disagg.transport.opening import Opening
from qwen3vl_disagg.transport.sockets import listen
from qwen3vl_disagg.transport.store import host_store, join_store

MEET_S = 60.0
COLLECTIVE_S = 1800.0
"""Long: ranks compile side by side, at different speed. That one is gone is seen by its connection."""
_START_KEY = "start"


def shares_experts(setup: RankSetup) -> bool:
    """Whether this job's language ranks hold parts of one model; else each holds all of it."""
    return setup.config.text.num_experts > 0 and len(setup.context.layout.language_ranks) > 1


@dataclass
class ExpertGroup:
    """One language rank's place among all. `line` leads to the first one, which has the `lines` to all where they agree
    on steps; `is_compiled` says whether steps are graphs. The first rank's `store` is served while it is held."""

    rank: int
    size: int
    store: dist.TCPStore
    mesh: DeviceMesh
    line: Opening
    lines: Sequence[Line]
    is_compiled: bool

    @property
    def shards(self) -> ExpertShards:
        return ExpertShards(self.mesh)

    @property
    def kinds(self) -> tuple[DispatchKind, ...]:
        """In which ways rows may travel."""
        may_choose = not self.is_compiled and self.mesh.device_type == "cpu"
        return ("gather", "all_to_all") if may_choose else ("gather",)

    async def start_lockstep(
        self, setup: RankSetup, limits: PaceLimits
    ) -> tuple[LockstepClient, LockstepServer | None]:
        """This rank's way to the agreement, and on the first rank the agreement itself."""
        server = None
        if self.lines:
            text = setup.config.text
            row_bytes = text.hidden_size * setup.dtype.itemsize
            by_size = partial(choose_kind, num_choices=text.num_experts_per_tok, row_bytes=row_bytes)
            choose = by_size if len(self.kinds) > 1 else only_gather
            server = LockstepServer(Lockstep(self.size, limits, choose))
            server.serve(self.lines)
        return await LockstepClient.join(self.line), server


async def meet(setup: RankSetup, limits: PaceLimits) -> ExpertGroup:
    """Find the other language ranks by the store that the first one hosts, whose address the hub passes on.

    HandshakeError for a rank that differs from the first one in what must be equal, InputError for two ranks on one
    GPU; HubGone, Dismissed (of the hub), PeerLost or RuntimeError (of the store) when others are not there in time.
    """
    context, ranks = setup.context, setup.context.layout.language_ranks
    rank, gathering, lines = context.rank - ranks.start, None, list[Line]()
    facts = shared_facts(setup, limits)
    context.progress.stage("group", f"joining {len(ranks)} language ranks in a process group", ranks=len(ranks))
    if context.is_first_language_rank:
        store, store_address = host_store(context.host)
        listener = listen(context.host, backlog=1024)
        gathering = Gathering(listener, token=context.token, tls=context.tls)
        start = _Start(facts=facts, lockstep=listener.getsockname()[:2])
        store.set(_START_KEY, msgspec.json.encode(start).decode())
        await tell_store(context.hub_address, context.token, store_address, deadline_s=MEET_S, tls=context.tls)
    else:
        store_address = await find_store(context.hub_address, context.token, deadline_s=MEET_S, tls=context.tls)
        store = join_store(store_address)
        start = msgspec.json.decode(store.get(_START_KEY), type=_Start)
        check_fingerprint(start.facts, facts)
    gpu = f"{host_id()}/{setup.device.index}"
    if setup.device.type == "cuda" and store.add(f"gpu/{gpu}", 1) > 1:  # NCCL would hang or fail without a word
        raise InputError(f"two language ranks on {setup.device}: each needs a GPU of its own", param="device")
    # Beside the loop, in which the first rank takes them in.
    line = await asyncio.to_thread(say_hello, start.lockstep, PeerHello(token=context.token, rank=rank), context.tls)
    # A client of its own: a thread that waits in a store blocks every other call on it.
    client = store.clone()  # type: ignore[attr-defined]
    client.set(f"here/{rank}", "")
    # With all of them here the group is made in a moment; its own timeout is a long one.
    here = [f"here/{other}" for other in range(len(ranks))]
    await asyncio.to_thread(client.wait, here, timedelta(seconds=MEET_S))
    if gathering is not None:
        lines = await gathering.all(len(ranks), MEET_S)
    mesh = expert_mesh(client, rank, len(ranks), host=context.host, device=setup.device, timeout_s=COLLECTIVE_S)
    is_compiled = resolve_compile(context.options.model.compile, setup.device)
    return ExpertGroup(rank, len(ranks), store, mesh, line, lines, is_compiled)


class _Start(msgspec.Struct):
    """What the first rank says to the others, in the store."""

    facts: dict[str, str]
    lockstep: tuple[str, int]


def shared_facts(setup: RankSetup, limits: PaceLimits) -> dict[str, str]:
    """What must be equal on ranks that hold parts of one decoder and take the same steps, by name."""
    is_compiled = resolve_compile(setup.context.options.model.compile, setup.device)
    return {
        **setup.fingerprint,
        "decoder": repr(setup.config.text),
        "decoder_weights": decoder_digest(setup.folder),
        "device": setup.device.type,
        "quantize": setup.context.options.model.quantize,
        "compile": str(is_compiled),
        "canary": setup.context.options.canary,
        "kernels": str(is_compiled and load() is not None),  # a graph more, and so a first step more
        "chunk_tokens": str(limits.chunk_tokens),
        "gap_target_ms": str(None if setup.context.options.chunk_tokens else setup.context.options.gap_target_ms),
        "max_prefill_tokens": str(limits.max_prefill_tokens),
    }


def only_gather(rows: Sequence[int], num_rows: int) -> DispatchKind:
    """For graphs, which are made for fixed shapes, and for GPUs, where nothing was measured yet."""
    return "gather"
