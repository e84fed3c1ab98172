"""The language ranks as one model: how they find one another, before any weights are loaded."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.disagg.control import Address
from qwen3vl_disagg.disagg.hub_client import find_store, tell_store
from qwen3vl_disagg.disagg.lockstep import DispatchKind, Lockstep, PaceLimits, PeerHello
from qwen3vl_disagg.disagg.lockstep_link import LockstepClient, LockstepServer
from qwen3vl_disagg.disagg.rank_setup import RankSetup
from qwen3vl_disagg.disagg.rendezvous import host_id
from qwen3vl_disagg.disagg.store import host_store, join_store
from qwen3vl_disagg.parallel.dispatch import choose_kind
from qwen3vl_disagg.parallel.expert_parallel import ExpertShards
from qwen3vl_disagg.parallel.gloo import expert_mesh

MEET_S = 60.0
COLLECTIVE_S = 1800.0
"""Long: ranks compile side by side, at different speed. That one is gone is seen by its connection."""
_LOCKSTEP_KEY = "lockstep"


def shares_experts(setup: RankSetup) -> bool:
    """Whether this job's language ranks hold parts of one model; else each holds all of it."""
    return setup.config.text.num_experts > 0 and len(setup.context.layout.language_ranks) > 1


@dataclass
class ExpertGroup:
    """One language rank's place among all. `rank` counts language ranks from 0; the first one has the `listener` at
    which all of them agree on steps, `lockstep_address` is where that is."""

    rank: int
    size: int
    store: dist.TCPStore
    store_address: Address
    mesh: DeviceMesh
    lockstep_address: Address
    listener: socket.socket | None

    @property
    def shards(self) -> ExpertShards:
        return ExpertShards(self.mesh)

    async def start_lockstep(
        self, setup: RankSetup, limits: PaceLimits, *, is_compiled: bool
    ) -> tuple[LockstepClient, LockstepServer | None]:
        """This rank's way to the agreement, and on the first rank the agreement itself."""
        server = None
        if self.listener is not None:
            text, token = setup.config.text, setup.context.token
            row_bytes = text.hidden_size * setup.dtype.itemsize
            by_size = partial(choose_kind, num_choices=text.num_experts_per_tok, row_bytes=row_bytes)
            choose = only_gather if is_compiled or setup.device.type != "cpu" else by_size
            server = LockstepServer(Lockstep(self.size, limits, choose), token=token)
            await server.serve(self.listener)
        hello = PeerHello(token=setup.context.token, rank=self.rank, facts=limits.facts)
        return await LockstepClient.join(self.lockstep_address, hello), server


async def meet(setup: RankSetup) -> ExpertGroup:
    """Find the other language ranks by the store that the first one hosts, whose address the hub passes on.

    HubGone or RuntimeError (of torch) when they are not there in time; InputError for two of them on one GPU.
    """
    context, ranks = setup.context, setup.context.layout.language_ranks
    rank, listener = context.rank - ranks.start, None
    if context.is_first_language_rank:
        store, store_address = host_store(context.host)
        listener = socket.create_server((context.host, 0), backlog=len(ranks))
        listener.setblocking(False)
        host, port = listener.getsockname()[:2]
        store.set(_LOCKSTEP_KEY, f"{host}:{port}")
        await tell_store(context.hub_address, context.token, store_address, deadline_s=MEET_S)
    else:
        store_address = await find_store(context.hub_address, context.token, deadline_s=MEET_S)
        store = join_store(store_address)
    gpu = f"{host_id()}/{setup.device.index}"
    if setup.device.type == "cuda" and store.add(f"gpu/{gpu}", 1) > 1:  # NCCL would hang or fail without a word
        raise InputError(f"two language ranks on {setup.device}: each needs a GPU of its own", param="device")
    host, _, port_text = store.get(_LOCKSTEP_KEY).decode().rpartition(":")
    # A client of its own: a thread that waits in a store blocks every other call on it.
    client = store.clone()  # type: ignore[attr-defined]
    mesh = expert_mesh(client, rank, len(ranks), host=context.host, device=setup.device, timeout_s=COLLECTIVE_S)
    return ExpertGroup(rank, len(ranks), store, store_address, mesh, (host, int(port_text)), listener)


def only_gather(rows: Sequence[int], num_rows: int) -> DispatchKind:
    """For graphs, which are made for fixed shapes, and for GPUs, where nothing was measured yet."""
    return "gather"
