"""A worker of torchrun, or of `qwen3vl-disagg serve`: its arguments parsed, it is a slot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import tyro

from qwen3vl_disagg.cluster.rendezvous import World
from qwen3vl_disagg.cluster.slots import run_worker
from qwen3vl_disagg.core.interrupt import leaving_at_once
from qwen3vl_disagg.core.logs import start_logging, use_log_format
from qwen3vl_disagg.launch.statuses import tell_status
from qwen3vl_disagg.options import JoinOptions, ServeOptions

Options = TypeVar("Options")


def run_parsed(kind: type[Options], prog: str, run_slot: Callable[[Options, World], int]) -> int:
    """Parse the arguments, then be a slot; returns the exit status. What does not parse, and --help, end before torch
    is there."""

    def run(world: World) -> int:
        with leaving_at_once():
            options = tyro.cli(kind, prog=prog, console_outputs=world.local_rank == 0)
            return run_slot(options, world)

    status = run_worker(run)
    tell_status(status)
    return status


def serve_slot(options: ServeOptions, world: World) -> int:
    """A slot of a server."""
    if world.has_agent and world.rank == 0 and not options.dry.dry_run:
        use_log_format(options.log_format)
        start_logging()
        world.progress().stage("import", f"loading PyTorch in {world.size} processes", processes=world.size)
    from qwen3vl_disagg.launch.serve import run_slot

    return run_slot(options, world)


def join_slot(options: JoinOptions, world: World) -> int:
    """A slot with an encode rank that joins a server."""
    from qwen3vl_disagg.launch.join import run_slot

    return run_slot(options, world)


serve = functools.partial(run_parsed, ServeOptions, "serve.py", serve_slot)
join = functools.partial(run_parsed, JoinOptions, "encode.py", join_slot)
