"""The one place that builds a 2-rank Gloo group: directly over a store, with no default group, so a link comes and goes
without the other ranks knowing.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from qwen3vl_disagg.transport.gloo import gloo_group


def build_pair(store: dist.Store, prefix: str, *, rank_in_pair: int, host: str, timeout_s: float) -> dist.ProcessGroup:
    """Meet the other end under `prefix` in `store`; blocks until both are there. Raises RuntimeError after the timeout.

    Each wait on the group without a timeout of its own takes `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    group = gloo_group(dist.PrefixStore(prefix, store), rank_in_pair, 2, host=host, timeout=timeout)
    # The second end to get here knows that nobody needs the keys of the meeting any more.
    if store.add(f"{prefix}/built", 1) == 2:
        forget_meeting(store, prefix)
    return group


def forget_meeting(store: dist.Store, prefix: str) -> None:
    """Delete what the ends of a pair have left in the store, also one that met nobody."""
    for key in ("0/0", "0/1", "built"):
        store.delete_key(f"{prefix}/{key}")
