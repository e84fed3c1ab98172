"""Whose lines of a start are heard: not those of every rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen3vl_disagg.cluster.rendezvous import Layout, Meeting, World
from qwen3vl_disagg.launch.bodies import tell_room
from qwen3vl_disagg.launch.serve import rank_context
from qwen3vl_disagg.options import ServeOptions
from qwen3vl_disagg.parallel.kv_room import KvRoom

MEETING = Meeting(hub_address=("127.0.0.1", 9), token="t", pid=1)


@pytest.mark.parametrize(("size", "expected"), [(1, {0}), (2, {0, 1}), (8, {0, 2}), (16, {0, 4})])
def test_rank_0_and_the_first_language_rank_speak(size, expected):
    heard = {
        rank
        for rank in range(size)
        if rank_context(ServeOptions(), World(rank=rank, size=size), Layout.of(size), MEETING).progress.is_heard
    }
    assert heard == expected


@pytest.mark.parametrize(
    ("size", "hosts", "num_encode", "expected"),
    [(1, 1, None, [0]), (2, 1, None, [1]), (8, 1, None, [2]), (8, 2, None, [2, 4]), (8, 2, 5, [5]), (9, 3, 3, [3, 6])],
)
def test_one_language_rank_of_each_host_says_that_images_do_not_fit(caplog, size, hosts, num_encode, expected):
    caplog.set_level("INFO", "qwen3vl_disagg")
    layout, local = Layout.of(size, num_encode), size // hosts
    warned = []
    for rank in layout.language_ranks:
        world = World(rank, size, rank % local, local, rank // local, hosts)
        context = rank_context(ServeOptions(), replace(world, has_agent=True), layout, MEETING)
        caplog.clear()
        tell_room(context, KvRoom(num_pages=4, page_size=16, token_bytes=8, context=4096), max_rows=100)
        lines = [line.partition(":")[0] for line in caplog.messages]
        assert (lines[:1] == ["64 tokens of keys and values (4 pages of 16, 0.00 GiB)"]) == (rank == expected[0])
        warned += [rank] if "warning" in lines else []
    assert warned == expected
