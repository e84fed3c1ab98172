"""The one place that builds a 2-rank Gloo group.

`ProcessGroupGloo` is built directly over a store, with no default group: a link comes and goes without the other ranks
knowing. `_Options` and `create_device` are half private, so this file is kept small and has a test of its own.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def build_pair(store: dist.Store, prefix: str, *, rank_in_pair: int, host: str, timeout_s: float) -> dist.ProcessGroup:
    """Meet the other end under `prefix` in `store`; blocks until both are there. Raises RuntimeError after the timeout.

    Each wait on the group without a timeout of its own takes `timeout_s`.
    """
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    group = dist.ProcessGroupGloo(dist.PrefixStore(prefix, store), rank_in_pair, 2, options)
    # The second end to get here knows that nobody needs the keys of the meeting any more.
    if store.add(f"{prefix}/built", 1) == 2:
        for key in (f"{prefix}/0/0", f"{prefix}/0/1", f"{prefix}/built"):
            store.delete_key(key)
    return group  # type: ignore[return-value]  # the stubs do not know that it is a ProcessGroup
