"""The scheduler over a stub model: the next token is a hash of all that came before, rows included, read from pages.

Random arrivals, several answers to a prompt, cancels, page pressure, rows that come late and in parts. A page in two
hands, a page found for another content, a chunk that starts at the wrong token or a row of another item gives another
token somewhere.
"""

from __future__ import annotations

import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.engine.scheduler import Scheduler, SchedulerLimits
from qwen3vl_disagg.engine.sequence import Samples, Sequence
from qwen3vl_disagg.transport.buffers import VisualRows

PAD = 0


class Context(tuple):
    """What a next token follows from, in place of logits."""

    def clone(self) -> Context:
        return self


def next_token(context: tuple) -> int:
    return 1 + int.from_bytes(hashlib.blake2b(repr(context).encode(), digest_size=4).digest(), "little") % 5


def content_of(sequence: Sequence, index: int) -> object:
    """What the model sees at a token of the sequence: its id, or a row of an item."""
    for item in sequence.items:
        for number, run in enumerate(item.runs):
            if run <= index < run + item.run_rows:
                return (item.digest, number * item.run_rows + index - run)
    return sequence.tokens(index, index + 1)[0]


class StubModel:
    """Pages of contents instead of keys and values."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[int, object] = {}

    def run(self, sequence: Sequence, start: int, stop: int) -> tuple:
        """Write tokens [start, stop); then all that the pages hold."""
        size, pages = self.page_size, sequence.pages
        assert len(pages) * size >= stop, "no page for a token"
        for item, low, high in sequence.touched(start, stop):
            rows = sequence.rows[item]
            assert rows.start <= low, "a row that has been used"
            assert high <= rows.stop, "a row that is not here"
        for index in range(start, stop):
            self.slots[pages[index // size] * size + index % size] = content_of(sequence, index)
        return tuple(self.slots[pages[i // size] * size + i % size] for i in range(stop))

    def copy(self, sequence: Sequence) -> None:
        if sequence.copied is not None:
            page, count = sequence.copied
            target = sequence.pages[sequence.num_prompt // self.page_size]
            for slot in range(count):
                self.slots[target * self.page_size + slot] = self.slots[page * self.page_size + slot]


def answer(token_ids: list[int], items: list[VisualItem], new: int, sample: int) -> list[int]:
    """The right tokens, without pages or steps."""
    alone = make_sequence("", token_ids, items, new)
    for _ in range(new):
        context = tuple(content_of(alone, i) for i in range(alone.num_tokens))
        alone.generated.append(next_token((context, sample)))
    return alone.generated


def make_sequence(
    name: str,
    token_ids: list[int],
    items: list[VisualItem],
    new: int,
    sample: int = 0,
    samples: Samples | None = None,
    due: float = FIRST_COME,
) -> Sequence:
    return Sequence(
        due=due,
        sample=sample,
        samples=samples or Samples(),
        request_id=name,
        token_ids=token_ids,
        items=items,
        sampling=SamplingParams(max_new_tokens=new),
        positions=torch.empty(3, 0, dtype=torch.long),
        delta=0,
        seed=0,
    )


def make_clip(offset: int) -> VisualItem:
    """Three runs of two rows, with two tokens of text and one between them."""
    runs = (offset, offset + 4, offset + 7)
    return VisualItem(
        modality="video", digest="v", num_bytes=1, grid=(3, 2, 4), num_rows=6, offset=offset, param="", run_offsets=runs
    )


@st.composite
def prompts(draw) -> tuple[list[int], list[VisualItem], int, int]:
    """Few different texts, images and clips, so that beginnings are shared; tokens of an answer, and answers."""
    token_ids, items = [], []
    for kind in draw(st.lists(st.sampled_from(["a", "b", "x", "y", "v"]), min_size=1, max_size=4)):
        if kind == "v":
            items.append(make_clip(len(token_ids)))
            token_ids += [PAD, PAD, 8, 9, PAD, PAD, 9, PAD, PAD]
        elif kind in "xy":
            rows = 3 if kind == "x" else 6
            visual = VisualItem(
                modality="image",
                digest=kind,
                num_bytes=1,
                grid=(1, 2, 2 * rows),
                num_rows=rows,
                offset=len(token_ids),
                param="",
            )
            items.append(visual)
            token_ids += [PAD] * rows
        else:
            token_ids += [7, 8, 9] if kind == "a" else [7, 9]
    return token_ids, items, draw(st.integers(1, 8)), draw(st.sampled_from([1, 1, 2, 3]))


class Program:
    """One scheduler and what happens to it."""

    def __init__(self, draw, num_requests: int) -> None:
        self.draw = draw
        size = draw(st.integers(1, 5))
        self.requests = {str(i): draw(prompts()) for i in range(num_requests)}
        longest = max(len(ids) + new - 1 for ids, _, new, _ in self.requests.values())
        least = -(-longest // size)
        self.pool = PagePool(draw(st.integers(least, 3 * least)), size, keep=draw(st.booleans()))
        limits = SchedulerLimits(
            max_running=draw(st.integers(1, 4)),
            max_prefill_tokens=draw(st.integers(1, 20)),
            chunk_tokens=draw(st.integers(1, 8)),
            overlap=draw(st.booleans()),
            min_overlap_tokens=draw(st.integers(1, 8)),
        )
        self.scheduler, self.model = Scheduler(self.pool, limits), StubModel(size)
        self.scheduler.is_short_of_room = draw(st.booleans())
        self.alive: dict[str, Sequence] = {}
        self.lacking: list[tuple[Sequence, int]] = []
        self.finished: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.first_tokens: list[int] = []

    def add(self, name: str) -> None:
        *prompt, count = self.requests[name]
        samples = Samples()
        due = self.draw(st.sampled_from([FIRST_COME, 1.0, 2.0, 3.0]))
        for sample in range(count):
            sequence = make_sequence(name, *prompt, sample, samples, due)
            self.alive[sequence.name] = sequence
            self.scheduler.add(sequence)

    def cancel(self, name: str) -> None:
        sequence = self.alive.pop(name)
        assert self.scheduler.remove(sequence.request_id, sequence.sample)
        self.lacking = [entry for entry in self.lacking if entry[0] is not sequence]
        self.cancelled.add(name)

    def give_rows(self) -> None:
        sequence, index = self.lacking.pop(self.draw(st.integers(0, len(self.lacking) - 1)))
        item = sequence.items[index]
        first = max(sequence.first_row(index), item.rows_before(sequence.num_cached))
        stop = self.draw(st.integers(first + 1, item.num_rows))
        sequence.rows[index] = VisualRows(1, first, stop, (), ())

    def step(self) -> bool:
        """One step of the engine; whether anything was done."""
        scheduler = self.scheduler
        had_step = scheduler.has_step
        admitted = scheduler.admit()
        # Nobody comes in before who is not passed over for another answer to the same prompt.
        single = [s.urgency for s in scheduler.waiting if self.requests[s.request_id][-1] == 1]
        assert not single or all(s.urgency < min(single) for s in admitted), "somebody was passed"
        for sequence in admitted:
            assert sequence.num_cached == sequence.num_found <= sequence.num_tokens
            self.model.copy(sequence)
            lacking = [i for i, item in enumerate(sequence.items) if sequence.first_row(i) < item.num_rows]
            assert not lacking or sequence.samples.admitted == [sequence], "two of a request read rows"
            self.lacking += [(sequence, index) for index in lacking]
        starting = [sequence for sequence in scheduler.admitted.values() if sequence.can_begin]
        for sequence in starting:
            self.accept(sequence, sequence.samples.share(sequence))
        step, preempted = scheduler.schedule()
        assert had_step == bool(admitted or starting or step or preempted)
        for sequence in preempted:
            assert all(sequence.order > other.order for other in scheduler.admitted.values())
            self.lacking = [entry for entry in self.lacking if entry[0] is not sequence]
        if step is None:
            return had_step
        is_decoding = any(s.is_decoding for s in scheduler.admitted.values())
        budget = scheduler.limits.chunk_tokens if is_decoding else scheduler.limits.max_prefill_tokens
        assert sum(chunk.stop - chunk.start for chunk in step.prefill) <= budget
        turns = [chunk.sequence.urgency for chunk in step.prefill]
        assert turns == sorted(turns)
        for chunk in step.prefill:
            assert chunk.sequence.num_cached == chunk.start < chunk.stop
            self.advance(chunk.sequence, chunk.start, chunk.stop, chunk.is_last)
        for sequence in step.decode:
            self.advance(sequence, sequence.num_cached, sequence.num_tokens, True)
        return True

    def advance(self, sequence: Sequence, start: int, stop: int, is_last: bool) -> None:
        context = self.model.run(sequence, start, stop)
        touched = sequence.touched(start, stop)
        sequence.num_cached = stop
        self.scheduler.remember(sequence)
        partial = [item.offset for item in sequence.items if item.runs[-1] + item.run_rows > stop]
        most = max(sequence.num_found, min([stop, *partial]))
        assert sequence.num_remembered * self.pool.page_size <= most, "a part of an item is remembered"
        for index, _, high in touched:
            if high == sequence.rows[index].stop:
                del sequence.rows[index]
                if high < sequence.items[index].num_rows:
                    self.lacking.append((sequence, index))
        if is_last:
            sequence.samples.keep(sequence, Context(context))
            self.accept(sequence, context)

    def accept(self, sequence: Sequence, context: tuple) -> None:
        sequence.generated.append(next_token((context, sequence.sample)))
        sequence.samples.begun()
        if len(sequence.generated) == sequence.sampling.max_new_tokens:
            assert self.scheduler.remove(sequence.request_id, sequence.sample)
            self.finished[sequence.name] = sequence.generated
            del self.alive[sequence.name]

    def check(self) -> None:
        in_use = {page for s in self.scheduler.admitted.values() for page in s.pages}
        held = [samples for samples in self.scheduler.samples.values() if samples.stem]
        assert not any(samples.admitted for samples in held), "a prompt is held that somebody has"
        in_use |= {page for samples in held for page in samples.stem}
        assert self.pool.num_free == self.pool.num_pages - len(in_use), "a page is lost"
        assert len(self.scheduler.admitted) <= self.scheduler.limits.max_running
        orders = [s.order for s in self.scheduler.admitted.values()]
        waiting = [s.urgency for s in self.scheduler.waiting]
        assert orders == sorted(orders)
        assert waiting == sorted(waiting)


@settings(deadline=None, max_examples=max(300, settings().max_examples))
@given(st.data())
def test_every_request_gets_its_tokens_and_every_page_comes_back(data):
    program = Program(data.draw, data.draw(st.integers(1, 6)))
    to_come = list(program.requests)
    for _ in range(4000):
        if not to_come and not program.alive:
            break
        choice = data.draw(st.integers(0, 9))
        if to_come and choice <= 1:
            program.add(to_come.pop(0))
        elif choice == 2 and program.alive and data.draw(st.booleans()):
            program.cancel(data.draw(st.sampled_from(sorted(program.alive))))
        elif program.lacking and choice <= 5:
            program.give_rows()
        elif not program.step():
            # Nothing can be done: then somebody must wait for rows, or nobody has come.
            assert program.lacking or not program.alive
            if program.lacking:
                program.give_rows()
            elif to_come:
                program.add(to_come.pop(0))
        program.check()
    assert not program.alive, "a request does not end"
    right = {
        make_sequence(name, *prompt, sample).name: answer(*prompt, sample)
        for name, (*prompt, count) in program.requests.items()
        for sample in range(count)
    }
    assert set(program.finished) | program.cancelled == set(right)
    for name, tokens in program.finished.items():
        assert tokens == right[name]
    assert not program.scheduler.samples
    assert program.pool.num_free == program.pool.num_pages
