"""The store in which ranks that share experts meet: ours, bound to the address it is given, never torchrun's."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from qwen3vl_disagg.transport.sockets import Address, listen

STORE_TIMEOUT_S = 30.0


def host_store(host: str) -> tuple[dist.TCPStore, Address]:
    """Start the store on a free port of `host`. A socket that we bound ourselves keeps it off other interfaces."""
    listener = listen(host, backlog=128)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
        master_listen_fd=listener.detach(),
    )
    return store, (host, port)


def join_store(address: Address) -> dist.TCPStore:
    """A client of a hosted store."""
    timeout = timedelta(seconds=STORE_TIMEOUT_S)
    return dist.TCPStore(address[0], address[1], is_master=False, wait_for_workers=False, timeout=timeout)
