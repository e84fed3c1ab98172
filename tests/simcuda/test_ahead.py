"""Decode steps that are begun before the host knows the tokens they go on from, on the simulated device."""

from __future__ import annotations

import random

import pytest
import torch
from msgspec.structs import replace

from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.protocol.messages import Finished, NeedItems
from tests.simcuda.test_graphs import COMMON, OTHERS, model, on_device
from tests.support.engine import make_engine, make_requests, token_ids
from tests.support.simcuda import H2D, STAGED, WAITS, simulated

PAGE = 16
KINDS = [*3 * [*COMMON.values()], *OTHERS.values()]


class Noted:
    """What an engine replays, in order: `model` and `pick`, and `wait` where the host waits for tokens."""

    def __init__(self, engine) -> None:
        self.calls: list[str] = []
        decode, pick = engine.runner.captured, engine.sampler.captured
        self._note(decode.graphs, "replay", "model")
        for graphs in pick._graphs.values():
            self._note(graphs, "replay", "pick")
        self._note(torch.cuda.Event, "synchronize", "wait")

    def _note(self, owner: object, name: str, what: str) -> None:
        call = getattr(owner, name)
        setattr(owner, name, lambda *args: self.calls.append(what) or call(*args))


def test_the_next_step_is_under_way_when_the_host_waits_for_the_tokens_of_the_last():
    """Whoever reaches its length is no part of it, and the last step of all has none behind it."""
    with simulated() as watch:
        engine = make_engine(on_device(watch), compile=True, page_size=16, max_running=4)
        for name, count in {"a": 4, "b": 6}.items():
            engine.add(name, [20, 21, 22], [], SamplingParams(max_new_tokens=count, ignore_eos=True))
        engine.step()  # the prompts, and the first tokens
        noted, steps, rows = Noted(engine), [], []
        run_behind = engine.runner.captured.run_behind
        engine.runner.captured.run_behind = lambda s, *args: rows.append([x.name for x in s]) or run_behind(s, *args)
        while not engine.is_empty:
            watch.reset()
            engine.step()
            steps.append(" ".join(noted.calls))
            noted.calls.clear()
            assert (watch.of(*WAITS), watch.of(H2D, STAGED)) == (1, 0)
        assert not watch.problems, str(watch)
    assert steps == ["model pick model wait", *["pick model wait"] * 3, "pick wait"]
    assert rows == [["a", "b"], ["a", "b"], ["b"], ["b"]]


class Crowd:
    """Requests of all kinds that come, are cancelled and end, driven by one seed."""

    def __init__(self, seed: int, *, num_turns: int, **options) -> None:
        self.requests = make_requests(model(), 24)
        draw = random.Random(seed)
        self.kinds = {name: replace(draw.choice(KINDS), seed=number) for number, name in enumerate(self.requests)}
        self.comes_at = {name: draw.randint(0, num_turns) for name in self.requests}
        self.leaves_at = {
            name: self.comes_at[name] + draw.randint(2, 25) for name in self.requests if draw.random() < 0.3
        }
        self.options = {"max_running": 5, "page_size": PAGE, **options}

    def run(self, engine) -> dict[str, list]:
        events: dict[str, list] = {name: [] for name in self.requests}
        for turn in range(600):
            for name, at in self.comes_at.items():
                if at == turn:
                    ids, items, _ = self.requests[name]
                    engine.add(name, ids, items, self.kinds[name])
                if self.leaves_at.get(name) == turn:
                    engine.cancel(name)
            if engine.is_empty and turn > 90:
                return events
            for event in engine.step():
                events[event.request_id].append(event)
                if isinstance(event, NeedItems):
                    for index in event.items:
                        rows = self.requests[event.request_id][2][index]
                        engine.provide_rows(event.request_id, index, rows, ItemTimings())
        raise AssertionError("the engine does not come to an end")


def windows(calls: list[str], size: int) -> list[list[str]]:
    return [calls[start : start + size] for start in range(len(calls))]


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize(("num_turns", "kv_cache_gib"), [(60, 0.01), (6, 0.00007)])
def test_answers_are_those_of_a_device_that_is_waited_for(seed, num_turns, kv_cache_gib):
    """Whoever comes, is cancelled or ends meanwhile; in a pool so small that they take pages from each other, too."""
    crowd = Crowd(seed, num_turns=num_turns, kv_cache_gib=kv_cache_gib)
    wanted = crowd.run(make_engine(model(), attention="sdpa", **crowd.options))
    with simulated() as watch:
        engine = make_engine(on_device(watch), compile=True, **crowd.options)
        noted = Noted(engine)
        found = crowd.run(engine)
        assert not watch.problems, str(watch)
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
    assert sum(x == ["pick", "model", "wait"] for x in windows(noted.calls, 3)) > 5
    assert (engine.scheduler.num_preempted > 0) == (kv_cache_gib < 0.01)
    for name in crowd.requests:
        ours, theirs = token_ids(found[name]), token_ids(wanted[name])
        if name in crowd.leaves_at:  # how far each had come is another matter
            ours, theirs = ours[: len(theirs)], theirs[: len(ours)]
        assert ours == theirs, name
        assert name in crowd.leaves_at or isinstance(found[name][-1], Finished)


def test_numbers_that_are_not_finite_end_their_request_alone():
    with simulated() as watch:
        engine = make_engine(on_device(watch), compile=True, page_size=16, max_running=4)
        for name in "ab":
            engine.add(name, [20, 21, 22], [], SamplingParams(max_new_tokens=8, ignore_eos=True))
        events = engine.step() + engine.step()
        engine.runner.captured.logits_of(2).elem[0, 3] = float("nan")  # of the step that is under way
        while not engine.is_empty:
            events += engine.step()
        assert not watch.problems
    kinds = {name: [type(event).__name__ for event in events if event.request_id == name] for name in "ab"}
    assert kinds["a"] == ["Tokens", "Tokens", "RequestFailed"]
    assert kinds["b"] == ["Tokens"] * 8 + ["Finished"]


def test_nothing_is_begun_ahead_of_a_prompt_that_waits():
    """Whoever comes waits for the step that is under way, and for no other."""
    with simulated() as watch:
        engine = make_engine(on_device(watch), compile=True, page_size=16, chunk_tokens=16, max_prefill_tokens=16)
        engine.add("a", [20, 21, 22], [], SamplingParams(max_new_tokens=40, ignore_eos=True))
        engine.step()
        engine.step()
        noted, steps = Noted(engine), []
        engine.add("b", [*range(20, 60)], [], SamplingParams(max_new_tokens=9, ignore_eos=True))
        for _ in range(8):
            engine.step()
            steps.append(" ".join(noted.calls))
            noted.calls.clear()
    chunk, alone = "", "model pick wait"
    assert steps == ["pick wait", chunk, alone, chunk, alone, chunk, "model pick model wait", "pick model wait"]
