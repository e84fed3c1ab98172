"""Encode ranks for a server that runs already, on this host or another one.

    torchrun --nproc-per-node 4 recipes/encode.py --join HOST:PORT [options]

Each worker of torchrun is a slot that forks an encode rank; without torchrun there is one. They join at any time, and
leave on SIGTERM when what they have under way has ended. They end by themselves when the server does.
"""

from __future__ import annotations

from qwen3vl_disagg.cluster.slots import leave_process
from qwen3vl_disagg.launch.worker import join as main

if __name__ == "__main__":
    leave_process(main())
