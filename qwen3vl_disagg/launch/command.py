"""`qwen3vl-disagg serve`: the arguments are checked here, then this process is the one slot, or torchrun's agent over
several, without its tracebacks: what went wrong has been said by whom it happened to."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

from qwen3vl_disagg.cluster.rendezvous import World
from qwen3vl_disagg.cluster.slots import run_worker
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.logs import start_logging, use_log_format
from qwen3vl_disagg.launch.serve import check_arguments, check_checkpoint, make_folder, run_slot
from qwen3vl_disagg.launch.statuses import collected_statuses, first_failure
from qwen3vl_disagg.options import ServeOptions
from qwen3vl_disagg.plan.dry_run import check_dry_run

logger = logging.getLogger(__name__)
DEFAULT_WORLD = 2
"""An encode rank and a language rank."""


def run_serve(options: ServeOptions, args: Sequence[str]) -> int:
    """Serve until a signal, or a failure; returns the exit status. `args`: those that `options` were parsed of.

    InputError, CheckpointError or DisaggError for what is wrong before.
    """
    here = World.from_env()
    if here.has_agent:
        raise InputError("under torchrun it is recipes/serve.py that serves", param="world")
    if options.dry.dry_run:
        return run_slot(options, here)
    size = DEFAULT_WORLD if options.dry.world is None else options.dry.world
    check_dry_run(options.dry, options.model.model, size)
    check_arguments(options, replace(here, size=size, num_local_ranks=size))
    make_folder(options.spans)
    check_checkpoint(options.model, options.buffers, options.http.max_model_len)
    use_log_format(options.log_format)
    start_logging()
    if size == 1:
        return run_worker(lambda world: run_slot(options, world))
    return _supervise(size, args)


def _supervise(size: int, args: Sequence[str]) -> int:
    """Be torchrun's agent of `size` workers on this host; the status of the first that failed, also after a signal."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // size)))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=secrets.token_hex(8),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT",
    )
    as_they_are = [arg.replace("$", "$$") for arg in args]  # torch fills templates in
    with collected_statuses() as statuses:
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "qwen3vl_disagg.launch.begin", *as_they_are)
        except ChildFailedError as error:
            _, first = error.get_first_failure()
            return first.exitcode if first.exitcode > 0 else 1
        except SignalException as end:
            failure = first_failure(statuses, size)
            if failure is not None:
                logger.error("slot %d did not end cleanly: exit %d", *failure)
                return failure[1]
            return 0 if end.sigval in (signal.SIGTERM, signal.SIGINT) else 1
    return 0
