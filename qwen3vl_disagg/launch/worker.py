"""A worker of torchrun: its arguments parsed, it is a slot. `recipes/serve.py` and `qwen3vl-disagg serve` start it."""

from __future__ import annotations

import tyro

from qwen3vl_disagg.cluster.rendezvous import World
from qwen3vl_disagg.cluster.slots import leave_process, run_worker
from qwen3vl_disagg.core.interrupt import leaving_at_once
from qwen3vl_disagg.options import ServeOptions


def run(world: World) -> int:
    """Parse the arguments, then be a slot. SystemExit for --help and for what does not parse: before torch is there."""
    with leaving_at_once():
        options = tyro.cli(ServeOptions, prog="serve.py", console_outputs=world.local_rank == 0)
        from qwen3vl_disagg.launch.serve import run_slot

        return run_slot(options, world)


def main() -> int:
    """Run one slot; returns the exit status."""
    return run_worker(run)


if __name__ == "__main__":
    leave_process(main())
