"""`recipes/serve.py` whose ranks have a simulated GPU: one for all of them, that nothing but its name has."""

from __future__ import annotations

import sys
from collections.abc import Callable

from qwen3vl_disagg.cluster.rendezvous import RankContext
from qwen3vl_disagg.cluster.slots import leave_process
from qwen3vl_disagg.launch import serve
from qwen3vl_disagg.launch.worker import serve as main

_run_threaded = serve.run_threaded


def run_simulated(body: Callable[[RankContext], int], context: RankContext) -> int:
    """In the rank's process, once it is forked."""
    from tests.support.simcuda import simulated

    with simulated() as watch:
        status = _run_threaded(body, context)
    print(f"simulated: problems {watch.problems}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    serve.run_threaded = run_simulated
    leave_process(main())
