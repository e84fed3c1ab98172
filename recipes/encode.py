"""Encode ranks for a server that runs already, on this host or another one.

    torchrun --nproc-per-node 4 recipes/encode.py --join HOST:PORT [options]

Each worker of torchrun is a slot that forks an encode rank; without torchrun there is one. They join at any time, and
leave on SIGTERM when what they have under way has ended. They end by themselves when the server does.
"""

from __future__ import annotations

import tyro

from qwen3vl_disagg.cluster.rendezvous import World
from qwen3vl_disagg.cluster.slots import leave_process, run_worker
from qwen3vl_disagg.core.interrupt import leaving_at_once
from qwen3vl_disagg.options import JoinOptions


def run(world: World) -> int:
    """Parse the arguments, then be a slot. SystemExit for --help and for what does not parse: before torch is there."""
    with leaving_at_once():
        options = tyro.cli(JoinOptions, prog="encode.py", console_outputs=world.local_rank == 0)
        from qwen3vl_disagg.launch.join import run_slot

        return run_slot(options, world)


def main() -> int:
    """Run one slot; returns the exit status."""
    return run_worker(run)


if __name__ == "__main__":
    leave_process(main())
