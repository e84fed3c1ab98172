"""Serve a checkpoint: encode ranks, language ranks, and an HTTP frontend.

    torchrun --nproc-per-node 8 recipes/serve.py [options]
    torchrun --nnodes 2 --node-rank K --master-addr A --master-port P --nproc-per-node 8 recipes/serve.py --hub A:P2 ..

Each worker of torchrun is a slot that forks its rank and supervises it; slot 0 also forks the frontend. On one host
`qwen3vl-disagg serve --world 8 [options]` does the same.
"""

from __future__ import annotations

from qwen3vl_disagg.cluster.slots import leave_process
from qwen3vl_disagg.launch.worker import serve as main

if __name__ == "__main__":
    leave_process(main())
