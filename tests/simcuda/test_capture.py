"""Graphs of the simulated device: they refuse what CUDA refuses, and replay from the memory of their capture."""

from __future__ import annotations

import pytest
import torch

from tests.support.simcuda import DEVICE, simulated


def captured(run) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local"):
        run()
    return graph


def test_a_replay_computes_from_what_its_memory_holds_now():
    with simulated() as watch:
        x, table, out = (torch.zeros(3, device=DEVICE) for _ in range(3))
        place = torch.tensor([1]).pin_memory()

        def step():
            table[place.to(DEVICE, non_blocking=True)] = 5.0
            y = (x + 1) * 2
            y[0] = 7.0
            out.copy_(y.view(3, 1).squeeze(1) + table)

        graph = captured(step)
        assert out.tolist() == table.tolist() == [0.0, 0.0, 0.0]  # nothing runs while it is captured
        graph.replay()
        assert out.tolist() == [7.0, 7.0, 2.0]
        x.fill_(3.0)
        table.zero_()
        place.fill_(2)
        graph.replay()
        assert out.tolist() == [7.0, 8.0, 13.0]
        assert watch.graphs.num_replays == 2
        assert not watch.problems


def test_an_input_somewhere_else_has_no_effect():
    with simulated():
        held = {"x": torch.ones(2, device=DEVICE)}
        old, out = held["x"], torch.zeros(2, device=DEVICE)
        graph = captured(lambda: out.copy_(held["x"] * 2))
        held["x"] = torch.full((2,), 9.0, device=DEVICE)
        graph.replay()
        assert out.tolist() == [2.0, 2.0]
        assert old.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("problem", "act"),
    [
        ("stream is capturing .item", lambda x, host: x.sum().item()),
        ("stream is capturing .item", lambda x, host: bool(x[0] > 0)),
        ("stream is capturing .D2H", lambda x, host: x.tolist()),
        ("stream is capturing .D2H", lambda x, host: x.cpu()),
        ("stream is capturing .shape", lambda x, host: x.nonzero()),
        ("stream is capturing .shape", lambda x, host: x[x > 0]),
        ("stream is capturing .H2D blocking", lambda x, host: x.copy_(host)),
        ("stream is capturing .H2D blocking", lambda x, host: torch.tensor([1.0], device=DEVICE)),
        ("unless the CPU tensor is pinned", lambda x, host: host.to(DEVICE, non_blocking=True)),
        ("stream is capturing .capture", lambda x, host: captured(lambda: None)),
    ],
)
def test_what_may_not_be_captured(problem, act):
    with simulated() as watch:
        x = torch.ones(4, device=DEVICE)
        with pytest.raises(RuntimeError, match=problem):
            captured(lambda: act(x, torch.arange(4.0)))
        assert len(watch.problems) == 1
        assert x.tolist() == [1.0] * 4  # and the thread may wait again


def test_memory_of_the_pool_that_is_held_on_to():
    with simulated() as watch:
        x, kept = torch.ones(4, device=DEVICE), []
        with pytest.raises(RuntimeError, match=r"held on to behind its capture: \[\(4,\)\]"):
            captured(lambda: kept.append((x * 2).view(2, 2)))
        assert len(watch.problems) == 1


def test_memory_that_was_given_back():
    with simulated():
        out, held = torch.zeros(4, device=DEVICE), [torch.ones(4, device=DEVICE)]
        graph = captured(lambda: out.copy_(held[0] * 3))
        graph.replay()
        held.clear()
        with pytest.raises(RuntimeError, match="reads memory that was given back"):
            graph.replay()


def test_other_threads_may_go_on():
    """As the tower's, beside an engine that is made: only where the capture says that it is of its thread alone."""
    with simulated():
        x = torch.ones(2, device=DEVICE)
        with (
            pytest.raises(RuntimeError, match="other threads"),
            torch.cuda.graph(torch.cuda.CUDAGraph(), pool=torch.cuda.graph_pool_handle()),
        ):
            x.add_(1)
        with pytest.raises(RuntimeError, match="was not captured"):
            torch.cuda.CUDAGraph().replay()


@pytest.mark.parametrize("is_ordered", [True, False])
@pytest.mark.parametrize("is_written", [True, False])
def test_a_replay_is_a_step_of_its_stream(is_ordered, is_written):
    """What the graph reads was written on another stream, or what it writes is read there."""
    with simulated() as watch:
        x, out = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
        graph = captured(lambda: out.copy_(x * 2))
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            _ = x.add_(1) if is_written else out + 1
        if is_ordered:
            torch.cuda.current_stream().wait_stream(other)
            graph.replay()
            assert out.tolist() == [4.0 if is_written else 2.0] * 4
        else:
            with pytest.raises(RuntimeError, match="without an order"):
                graph.replay()
        assert bool(watch.problems) != is_ordered


def test_a_graph_keeps_the_priority_of_its_capture():
    with simulated():
        x = torch.ones(4, device=DEVICE)
        graph = captured(lambda: x.add_(1))
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream(priority=-1)), pytest.raises(RuntimeError, match="priority"):
            graph.replay()
