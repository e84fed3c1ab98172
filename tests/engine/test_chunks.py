"""Prompts prefilled piece by piece, as their rows come: the same answers, and no row is read twice or too late."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams
from qwen3vl_disagg.engine.engine import Engine, Preempted
from qwen3vl_disagg.engine.scheduler import Chunk
from qwen3vl_disagg.protocol.messages import Finished, NeedItems, Tokens
from qwen3vl_disagg.protocol.session_events import Consumed
from qwen3vl_disagg.transport.buffers import VisualRows
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import random_language_model, small_config

GREEDY = SamplingParams(max_new_tokens=4, logprobs=2)
MODEL = random_language_model(small_config(), seed=0)
REQUESTS = {name: request for name, request in make_requests(MODEL, 6).items() if request[1]}
WHOLE = run(make_engine(MODEL), REQUESTS, GREEDY)
LONGEST = max(len(ids) for ids, _, _ in REQUESTS.values()) + GREEDY.max_new_tokens


def logprobs(events) -> torch.Tensor:
    return torch.tensor([e.logprob for event in events if isinstance(event, Tokens) for e in event.logprobs])


def spoil(window: VisualRows, rows: int) -> None:
    """Nobody may read rows below `rows` of the item any more."""
    for first, piece in (*window.main, *window.deepstack):
        piece[: max(0, rows - first)] = float("nan")


class Feeder:
    """Gives an engine the rows of its requests in windows, each a copy of its own, and spoils what has been used."""

    def __init__(self, engine: Engine, draw) -> None:
        self.engine, self.draw = engine, draw
        self.used: dict[tuple[str, int], int] = {}
        self.first: dict[tuple[str, int], int] = {}
        self.windows: dict[tuple[str, int], VisualRows] = {}
        self.attempts: dict[tuple[str, int], int] = {}
        self.lacking: list[tuple[str, int]] = []

    def need(self, event: NeedItems) -> None:
        for index, first in zip(event.items, event.first_rows, strict=True):
            key = (event.request_id, index)
            self.first[key] = self.used[key] = first
            self.attempts[key] = self.attempts.get(key, 0) + 1
            self.lacking.append(key)

    def forget(self, name: str) -> None:
        """It was preempted."""
        self.lacking = [key for key in self.lacking if key[0] != name]
        for key in [key for key in self.windows if key[0] == name]:
            self.spoil_window(key)

    def spoil_window(self, key: tuple[str, int]) -> None:
        window = self.windows.pop(key)
        spoil(window, window.stop)

    def give(self) -> None:
        """The next rows of an item that lacks some."""
        name, index = key = self.lacking.pop(self.draw(st.integers(0, len(self.lacking) - 1)))
        start, total = self.used[key], REQUESTS[name][1][index].num_rows
        stop = self.draw(st.integers(start + 1, total))
        whole = REQUESTS[name][2][index]
        main, deepstack = whole.main[0][1][start:stop].clone(), whole.deepstack[0][1].clone()
        cut = self.draw(st.integers(1, stop - start))
        pieces = ((start, main[:cut]), (start + cut, main[cut:])) if cut < stop - start else ((start, main),)
        self.windows[key] = VisualRows(self.attempts[key], start, stop, pieces, ((0, deepstack),))
        spoil(self.windows[key], start)
        self.engine.provide_rows(name, index, self.windows[key], ItemTimings())

    def take(self, event: Consumed) -> None:
        key = (event.request_id, event.item)
        window = self.windows[key]
        assert max(window.start, self.used[key]) < event.rows <= window.stop, "used twice, or before they came"
        assert event.attempt == self.attempts[key]
        self.used[key] = event.rows
        spoil(window, event.rows)
        if event.rows == window.stop:
            del self.windows[key]
            if event.rows < REQUESTS[key[0]][1][key[1]].num_rows:
                self.lacking.append(key)

    def restart(self, name: str, index: int) -> None:
        """An attempt is lost, maybe after all its rows were used: rows of another come, from the first one needed."""
        key = (name, index)
        self.engine.restart_item(name, index)
        is_whole = self.used[key] == REQUESTS[name][1][index].num_rows
        if key in self.windows:
            self.spoil_window(key)
        if not is_whole:
            self.used[key] = self.first[key]
            self.attempts[key] += 1
            if key not in self.lacking:
                self.lacking.append(key)


def drive(engine: Engine, draw, restarts: int) -> dict[str, list]:
    """All requests at once, rows in windows of any size, some attempts lost."""
    feeder = Feeder(engine, draw)
    events: dict[str, list] = {name: [] for name in REQUESTS}
    for name, (ids, items, _) in REQUESTS.items():
        engine.add(name, ids, items, GREEDY)
    for _ in range(3000):
        if engine.is_empty:
            break
        if feeder.lacking and (not engine.has_work or draw(st.booleans())):
            feeder.give()
        begun = sorted(key for key in feeder.used if key[0] in engine.scheduler.admitted)
        if restarts and begun and draw(st.integers(0, 9)) == 0:
            feeder.restart(*draw(st.sampled_from(begun)))
            restarts -= 1
        had_work = engine.has_work
        new = engine.step()
        assert had_work or not new
        kinds = [type(event) for event in new]
        assert Consumed not in kinds or Tokens not in kinds[: kinds.index(Consumed)]
        for event in new:
            events[event.request_id].append(event)
            match event:
                case NeedItems():
                    feeder.need(event)
                case Preempted():
                    feeder.forget(event.request_id)
                case Consumed():
                    feeder.take(event)
        if not engine.has_work and not feeder.lacking:
            engine.set_short_of_room(True)  # what a receiver without blocks says
    assert engine.is_empty
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
    for name in REQUESTS:
        for index, item in enumerate(REQUESTS[name][1]):
            assert feeder.used.get((name, index), item.num_rows) == item.num_rows
    return events


def gib_of(pages: int, page_size: int) -> float:
    """Memory for so many pages of MODEL, float32."""
    text = MODEL.config.text
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    return (pages + 0.5) * page_size * token_bytes / 2**30


@settings(max_examples=25)
@given(st.data())
def test_pieces_in_any_order_with_preemptions_and_found_pages_give_the_same_answer(data):
    """Chunks from 1 token up, pages of any size, few pages or many, twice the same prompts with or without a cache."""
    options = {
        "max_prefill_tokens": data.draw(st.integers(1, 30)),
        "chunk_tokens": data.draw(st.integers(1, 30)),
        "min_overlap_tokens": data.draw(st.sampled_from([1, 5, 256])),
        "overlap": data.draw(st.booleans()),
        "page_size": data.draw(st.integers(1, 9)),
        "prefix_cache": data.draw(st.booleans()),
    }
    least = -(-LONGEST // options["page_size"])
    options["kv_cache_gib"] = gib_of(data.draw(st.integers(least, 5 * least)), options["page_size"])
    engine = make_engine(MODEL, **options)
    engine.set_short_of_room(data.draw(st.booleans()))
    for _ in range(2):
        events = drive(engine, data.draw, restarts=3)
        for name in REQUESTS:
            assert token_ids(events[name]) == token_ids(WHOLE[name])
            assert torch.allclose(logprobs(events[name]), logprobs(WHOLE[name]), atol=1e-4)


def begin(name: str, **options) -> tuple[Engine, list]:
    """An engine that waits for the rows of one request, and these."""
    ids, items, rows = REQUESTS[name]
    engine = make_engine(MODEL, min_overlap_tokens=1, **options)
    engine.add(name, ids, items, GREEDY)
    engine.step()
    return engine, rows


def used(events) -> list[tuple[int, int, int]]:
    return [(event.item, event.attempt, event.rows) for event in events if isinstance(event, Consumed)]


def finish(engine: Engine) -> list:
    events = []
    while engine.has_work:
        events += engine.step()
    assert engine.is_empty
    return events


def test_a_restart_goes_back_to_the_first_row_and_takes_no_rows_on_their_way():
    engine, (first, second) = begin("r2")
    engine.provide_rows("r2", 0, first, ItemTimings())
    engine.provide_rows("r2", 1, replace(second, stop=2), ItemTimings())
    assert used(engine.step()) == [(0, 1, 6), (1, 1, 2)]
    engine.restart_item("r2", 1)
    assert engine.scheduler.admitted["r2"].num_cached == REQUESTS["r2"][1][1].offset
    engine.provide_rows("r2", 1, replace(second, start=2), ItemTimings())  # of the attempt before
    assert not engine.has_work
    engine.provide_rows("r2", 1, replace(second, attempt=2), ItemTimings())
    events = finish(engine)
    assert used(events) == [(1, 2, second.stop)]
    assert token_ids(events) == token_ids(WHOLE["r2"])
    assert torch.allclose(logprobs(events), logprobs(WHOLE["r2"]), atol=1e-4)


def test_a_restart_leaves_items_that_are_whole_or_have_not_been_read():
    engine, (first, second) = begin("r2", max_prefill_tokens=3)
    engine.provide_rows("r2", 0, first, ItemTimings())
    engine.provide_rows("r2", 1, second, ItemTimings())
    assert used(engine.step()) == [(0, 1, 3)]
    engine.restart_item("r2", 0)  # item 1 has not been reached: its rows stay
    assert not engine.has_work
    engine.provide_rows("r2", 0, replace(first, attempt=2), ItemTimings())
    assert [used(engine.step()) for _ in range(2)] == [[(0, 2, 3)], [(0, 2, 6)]]
    engine.restart_item("r2", 0)  # all of it is in the cache, from one attempt: it stays
    [event] = engine.provide_rows("r2", 0, replace(first, attempt=3), ItemTimings())
    assert used([event]) == [(0, 3, 6)]
    while engine.scheduler.admitted["r2"].num_cached <= REQUESTS["r2"][1][1].offset:
        engine.step()
    engine.restart_item("r2", 1)
    assert engine.scheduler.admitted["r2"].num_cached == REQUESTS["r2"][1][1].offset
    engine.provide_rows("r2", 1, replace(second, attempt=2), ItemTimings())
    events = finish(engine)
    assert {item for item, _, _ in used(events)} == {1}
    assert token_ids(events) == token_ids(WHOLE["r2"])


def test_a_restart_that_comes_too_late_changes_nothing():
    engine, (first, second) = begin("r2")
    engine.restart_item("unknown", 0)
    for index, rows in enumerate((first, second)):
        engine.provide_rows("r2", index, rows, None)
    events = engine.step()
    engine.restart_item("r2", 0)
    assert token_ids(events + finish(engine)) == token_ids(WHOLE["r2"])


def test_rows_of_an_item_in_the_cache_are_used_at_once_and_timings_are_the_last_ones():
    engine, (first, second) = begin("r2")
    engine.provide_rows("r2", 0, replace(first, stop=2), ItemTimings(encode=1.0))
    engine.step()
    engine.provide_rows("r2", 0, replace(first, start=2), ItemTimings(encode=2.0))
    engine.step()
    assert used(engine.provide_rows("r2", 0, first, ItemTimings(encode=3.0))) == [(0, 1, 6)]
    assert not engine.has_work
    engine.provide_rows("r2", 1, second, None)
    engine.cancel("unknown")
    engine.provide_rows("unknown", 0, first, ItemTimings())
    [end] = [event for event in finish(engine) if isinstance(event, Finished)]
    assert [item.encode for item in end.timings.items] == [2.0, 0.0]
    assert end.timings.prefill > 0


def test_a_window_takes_the_place_of_the_one_before():
    engine, (first, second) = begin("r2", max_prefill_tokens=3)
    engine.provide_rows("r2", 0, replace(first, stop=5), ItemTimings())
    assert used(engine.step()) == [(0, 1, 3)]
    later = tuple((3 + row, piece) for row, piece in enumerate(first.main[0][1][3:].split(1)))
    engine.provide_rows("r2", 0, replace(first, start=3, main=later), ItemTimings())
    assert used(engine.step()) == [(0, 1, 6)]
    assert not engine.scheduler.admitted["r2"].rows  # nobody keeps what has been used
    engine.provide_rows("r2", 1, second, ItemTimings())
    assert token_ids(finish(engine)) == token_ids(WHOLE["r2"])


def test_prompts_in_pieces_draw_the_same_random_numbers():
    sampling = SamplingParams(max_new_tokens=5, temperature=1.0, seed=3)
    whole, pieces = (run(make_engine(MODEL, max_prefill_tokens=n), REQUESTS, sampling) for n in (100, 3))
    assert {name: token_ids(events) for name, events in whole.items()} == {
        name: token_ids(events) for name, events in pieces.items()
    }


def test_chunks_of_one_token_alone_and_beside_longer_ones():
    """Visual rows too: a batch in which every chunk has length 1 takes another way through attention."""

    def logits(cuts: list[tuple[int, int]]) -> torch.Tensor:
        engine = make_engine(MODEL)
        for name in ("r1", "r2"):
            engine.add(name, *REQUESTS[name][:2], GREEDY)
        sequences = engine.scheduler.admit()
        starts, ends = [0, 0], torch.empty(2, MODEL.config.text.vocab_size)
        for sequence, name in zip(sequences, ("r1", "r2"), strict=True):
            sequence.rows = dict(enumerate(REQUESTS[name][2]))
        for cut in [*cuts, (100, 100)]:
            stops = [min(start + n, s.num_prompt) for start, n, s in zip(starts, cut, sequences, strict=True)]
            batch = [b for b in range(2) if stops[b] > starts[b]]
            if batch:
                chunks = [Chunk(sequences[b], starts[b], stops[b]) for b in batch]
                logits, _, is_sound, _ = engine.runner.prefill(chunks)
                assert is_sound.all()
                assert len(is_sound) + len(logits) == len(chunks)
                ends[[b for b, chunk in zip(batch, chunks, strict=True) if chunk.is_last]] = logits
            starts = stops
        return ends

    whole = logits([])
    for cuts in ([(1, 1)] * 40, [(1, 4)] * 40, [(5, 1)] * 40, [(4, 1), (1, 6), (1, 1), (1, 1)]):
        assert torch.allclose(logits(cuts), whole, atol=1e-4)


def test_a_chunk_without_visual_rows_gives_the_model_no_deepstack(monkeypatch):
    engine = make_engine(MODEL, min_overlap_tokens=1)
    name = next(name for name in REQUESTS if REQUESTS[name][1][0].offset >= 2)
    ids, items, rows = REQUESTS[name]
    seen = []
    forward = engine.runner.model.model.forward

    def watch(*args, **kwargs):
        seen.append((len(args[0]), kwargs.get("input_deepstack_embeds")))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.runner.model.model, "forward", watch)
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
