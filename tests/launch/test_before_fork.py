"""CUDA begins in a rank and never in its slot, whose forks would have no use of it; first with the rank's device."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_disagg.cluster.rank_setup import RankSetup
from qwen3vl_disagg.cluster.rendezvous import Layout, RankContext, World
from qwen3vl_disagg.cluster.slots import Child, Slot
from qwen3vl_disagg.launch import join, serve
from qwen3vl_disagg.options import JoinOptions, ServeOptions

BEGINS = {
    "is_available": True,
    "device_count": 4,
    "current_device": 0,
    "set_device": None,
    "synchronize": None,
    "mem_get_info": (1 << 30, 1 << 30),
    "get_device_name": "a GPU",
    "get_device_properties": None,
    "get_device_capability": (9, 0),
    "memory_allocated": 0,
    "empty_cache": None,
    "init": None,
    "_lazy_init": None,
}
"""What makes a context, or asks the driver, with an answer."""


@pytest.fixture
def called(monkeypatch):
    """Those that were called, in order, with what they were given."""
    calls: list[tuple] = []

    def recorder(name: str, answer: object):
        return lambda *args: calls.append((name, *args)) or answer

    for name, answer in BEGINS.items():
        monkeypatch.setattr(torch.cuda, name, recorder(name, answer))
    return calls


@pytest.fixture
def forked(monkeypatch):
    children: list[Child] = []
    monkeypatch.setattr(Slot, "_fork", lambda self, child, num_quick_deaths: children.append(child))
    return children


def serve_options(**fields) -> ServeOptions:
    made = ServeOptions(**fields)
    return ServeOptions(**{**vars(made), "http": type(made.http)(port=0)})


def test_a_server_forks_before_cuda_begins(called, forked):
    assert serve.run_slot(serve_options(gpus="2"), World()) == 0
    assert [child.name for child in forked] == ["keeper of last words", "frontend", "rank 0"]
    assert not called


def test_a_rank_that_joins_forks_before_cuda_begins(called, forked):
    assert join.run_slot(JoinOptions(join="127.0.0.1:9", token="t", gpus="2"), World()) == 0
    assert [child.name for child in forked] == ["encode rank"]
    assert not called


@pytest.mark.parametrize(("gpus", "index"), [(None, 1), ("3,2", 2)])
def test_a_rank_begins_with_its_device(called, gpus, index):
    world = World(rank=1, size=2, local_rank=1, num_local_ranks=2)
    context = RankContext(1, Layout.of(2), ("127.0.0.1", 9), "t", ServeOptions(gpus=gpus), world)
    assert RankSetup.of(context).device == torch.device("cuda", index)
    assert called == [("is_available",), ("device_count",), ("set_device", torch.device("cuda", index))]
