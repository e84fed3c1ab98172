"""What serve.py refuses before anything starts."""

from __future__ import annotations

import math

import pytest

from qwen3vl_disagg.cluster.rendezvous import World
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.launch.join import run_slot as run_joining_slot
from qwen3vl_disagg.launch.serve import run_slot
from qwen3vl_disagg.options import JoinOptions, ServeOptions


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunk_tokens": 0}, "--chunk-tokens 0"),
        ({"gap_target_ms": 0.0}, "--gap-target-ms 0"),
        ({"gap_target_ms": math.nan}, "--gap-target-ms nan"),
        ({"gap_target_ms": 60_001.0}, "--gap-target-ms 60001"),
        ({"gap_target_ms": 50.0, "chunk_tokens": 64}, "only one of them"),
    ],
)
def test_chunks_that_cannot_be(options, named):
    with pytest.raises(InputError, match=named):
        run_slot(ServeOptions(**options), World())


@pytest.mark.parametrize(("gpus", "problem"), [("0,1", "2 GPUs for 1 ranks"), ("a", "must be the numbers")])
def test_gpus_that_cannot_be(gpus, problem):
    with pytest.raises(InputError, match=problem):
        run_slot(ServeOptions(gpus=gpus), World())
    with pytest.raises(InputError, match=problem):
        run_joining_slot(JoinOptions(join="127.0.0.1:9", token="t", gpus=gpus), World())
