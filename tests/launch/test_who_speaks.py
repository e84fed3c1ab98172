"""Whose lines of a start are heard: not those of every rank."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.cluster.rendezvous import Layout, Meeting, World
from qwen3vl_disagg.launch.serve import rank_context
from qwen3vl_disagg.options import ServeOptions


@pytest.mark.parametrize(("size", "expected"), [(1, {0}), (2, {0, 1}), (8, {0, 2}), (16, {0, 4})])
def test_rank_0_and_the_first_language_rank_speak(size, expected):
    meeting = Meeting(hub_address=("127.0.0.1", 9), token="t", pid=1)
    heard = {
        rank
        for rank in range(size)
        if rank_context(ServeOptions(), World(rank=rank, size=size), Layout.of(size), meeting).progress.is_heard
    }
    assert heard == expected
