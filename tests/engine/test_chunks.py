"""Prompts prefilled piece by piece, as their rows come: the same answers, and no row is read twice or too late."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.disagg.messages import NeedItems, Tokens
from qwen3vl_disagg.disagg.rows import VisualRows
from qwen3vl_disagg.engine.engine import Engine, RowsUsed
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import random_language_model, small_config

GREEDY = SamplingParams(max_new_tokens=4, logprobs=2)
MODEL = random_language_model(small_config(), seed=0)
REQUESTS = {name: request for name, request in make_requests(MODEL, 6).items() if request[1]}
WHOLE = run(make_engine(MODEL), REQUESTS, GREEDY)


def logprobs(events) -> torch.Tensor:
    return torch.tensor([e.logprob for event in events if isinstance(event, Tokens) for e in event.logprobs])


class Feeder:
    """Gives an engine the rows of its requests in windows, and spoils what has been used."""

    def __init__(self, engine: Engine, draw) -> None:
        self.engine, self.draw = engine, draw
        self.used: dict[tuple[str, int], int] = {}
        self.windows: dict[tuple[str, int], VisualRows] = {}
        self.attempts: dict[tuple[str, int], int] = {}

    def give(self, name: str, index: int) -> None:
        """The next rows, as copies of their own."""
        start, total = self.used.get((name, index), 0), REQUESTS[name][1][index].num_rows
        stop = self.draw(st.integers(start + 1, total))
        whole = REQUESTS[name][2][index]
        main, deepstack = whole.main[0][1][start:stop].clone(), whole.deepstack[0][1].clone()
        cut = self.draw(st.integers(1, stop - start))
        pieces = ((start, main[:cut]), (start + cut, main[cut:])) if cut < stop - start else ((start, main),)
        attempt = self.attempts.setdefault((name, index), 1)
        self.windows[name, index] = VisualRows(attempt, start, stop, pieces, ((0, deepstack),))
        self.engine.provide_rows(name, index, self.windows[name, index], ItemTimings())

    def take(self, event: RowsUsed) -> None:
        key = (event.request_id, event.item)
        window = self.windows[key]
        before = max(window.start, self.used.get(key, 0))
        assert before < event.rows <= window.stop, "rows used twice, or before they came"
        assert event.attempt == self.attempts[key]
        self.used[key] = event.rows
        for first, piece in window.main:  # nobody may read them again
            piece[: max(0, event.rows - first)] = float("nan")
        if event.rows == window.stop:
            del self.windows[key]

    def restart(self, name: str, index: int) -> None:
        """The attempt is lost: rows of another one come, from the first row on."""
        for _, piece in self.windows.pop((name, index)).main:
            piece[:] = float("nan")
        self.engine.restart_item(name, index)
        self.attempts[name, index] += 1
        self.used.pop((name, index), None)


@settings(max_examples=40)
@given(st.data())
def test_pieces_in_any_order_give_the_same_answer(data):
    options = {
        "max_prefill_tokens": data.draw(st.integers(1, 30)),
        "min_overlap_tokens": data.draw(st.sampled_from([1, 5, 256])),
        "overlap": data.draw(st.booleans()),
    }
    engine = make_engine(MODEL, **options)
    engine.scheduler.is_short_of_room = data.draw(st.booleans())
    feeder = Feeder(engine, data.draw)
    events: dict[str, list] = {name: [] for name in REQUESTS}
    for name, (ids, items, _) in REQUESTS.items():
        engine.add(name, ids, items, GREEDY)
    lacking: list[tuple[str, int]] = []
    restarts = 3
    for _ in range(2000):
        if engine.is_empty:
            break
        if lacking and (not engine.has_work or data.draw(st.booleans())):
            feeder.give(*lacking.pop(data.draw(st.integers(0, len(lacking) - 1))))
        if restarts and feeder.windows and data.draw(st.integers(0, 9)) == 0:
            key = data.draw(st.sampled_from(sorted(feeder.windows)))
            feeder.restart(*key)
            lacking.append(key)
            restarts -= 1
        for event in engine.step():
            events[event.request_id].append(event)
            if isinstance(event, NeedItems):
                lacking += [(event.request_id, index) for index in event.items]
            if isinstance(event, RowsUsed):
                window = feeder.windows[event.request_id, event.item]
                feeder.take(event)
                total = REQUESTS[event.request_id][1][event.item].num_rows
                if event.rows == window.stop < total:
                    lacking.append((event.request_id, event.item))
        if not engine.has_work and not lacking:
            engine.scheduler.is_short_of_room = True  # what a receiver without blocks says
    assert engine.is_empty
    for name in REQUESTS:
        assert token_ids(events[name]) == token_ids(WHOLE[name])
        assert torch.allclose(logprobs(events[name]), logprobs(WHOLE[name]), atol=1e-4)
        for index, item in enumerate(REQUESTS[name][1]):
            assert feeder.used[name, index] == item.num_rows


def test_a_chunk_without_visual_rows_gives_the_model_no_deepstack(monkeypatch):
    engine = make_engine(MODEL, min_overlap_tokens=1)
    name = next(name for name in REQUESTS if REQUESTS[name][1][0].offset >= 2)
    ids, items, rows = REQUESTS[name]
    seen = []
    forward = engine.runner.model.forward

    def watch(*args, **kwargs):
        seen.append((len(args[0]), kwargs.get("input_deepstack_embeds")))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.runner.model, "forward", watch)
    engine.add(name, ids, items, GREEDY)
    engine.step()
    assert seen == [(items[0].offset, None)]
    for index, row in enumerate(rows):
        engine.provide_rows(name, index, row, ItemTimings())
    engine.step()
    assert seen[1][1].shape == (len(ids) - items[0].offset, rows[0].deepstack[0][1].shape[1])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_cancel_in_the_middle_of_a_prompt_frees_its_pages(steps):
    engine = make_engine(MODEL, max_prefill_tokens=3)
    free = engine.scheduler.pool.num_free
    for name, (ids, items, rows) in REQUESTS.items():
        engine.add(name, ids, items, GREEDY)
        engine.step()
        for index, row in enumerate(rows):
            engine.provide_rows(name, index, row, ItemTimings())
        for _ in range(steps):
            engine.step()
        engine.cancel(name)
        engine.restart_item(name, 0)  # too late: nothing happens
    assert engine.is_empty
    assert engine.scheduler.pool.num_free == free
