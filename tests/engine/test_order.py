"""Who is due first is served first: coming in, and in the tokens of a step. Nobody starves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.due import FIRST_COME, allowance
from qwen3vl_disagg.core.pooling import Pooling
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.engine.scheduler import Scheduler, SchedulerLimits, Step
from qwen3vl_disagg.engine.sequence import Sequence


def make_sequence(name: str, prompt: int, new: int = 1, due: float = FIRST_COME) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=[1] * prompt,
        items=[],
        sampling=SamplingParams(max_new_tokens=new),
        positions=torch.empty(3, 0, dtype=torch.long),
        delta=0,
        seed=0,
        due=due,
    )


@dataclass
class Rank:
    """A scheduler and its steps. `first_tokens`: requests in their order, with the step that gave it."""

    scheduler: Scheduler
    num_steps: int = 0
    first_tokens: dict[str, int] = field(default_factory=dict)

    def step(self) -> Step | None:
        scheduler = self.scheduler
        scheduler.admit()
        step, _ = scheduler.schedule()
        self.num_steps += 1
        for sequence, stop, is_last in [
            *((chunk.sequence, chunk.stop, chunk.is_last) for chunk in (step.prefill if step else ())),
            *((sequence, sequence.num_tokens, True) for sequence in (step.decode if step else ())),
        ]:
            sequence.num_cached = stop
            if is_last:
                sequence.generated.append(7)
                self.first_tokens.setdefault(sequence.request_id, self.num_steps)
                if len(sequence.generated) == sequence.sampling.max_new_tokens:
                    scheduler.remove(sequence.request_id)
        return step


def make_rank(num_pages: int = 10_000, **limits: int) -> Rank:
    return Rank(Scheduler(PagePool(num_pages, 4, keep=False), SchedulerLimits(**limits)))


@dataclass
class Asked:
    """A request that comes so many steps after the one before it."""

    after: int
    prompt: int
    new: int
    target: int


ASKED = st.builds(Asked, st.integers(0, 6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 20))
SIZES = {"max_running": st.integers(1, 3), "max_prefill_tokens": st.integers(1, 30), "chunk_tokens": st.integers(1, 9)}


def play(asked: list[Asked], rank: Rank, *, is_ordered: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Serve all of them; each one's arrival and allowance, in steps. A token costs a fifth of a step."""
    arrivals: dict[str, float] = {}
    allowances: dict[str, float] = {}
    for number, one in enumerate(asked):
        for _ in range(one.after):
            rank.step()
        name, now = str(number), rank.num_steps
        arrivals[name] = now
        allowances[name] = allowance(one.target if is_ordered else FIRST_COME, one.prompt / 5, 1000)
        rank.scheduler.add(make_sequence(name, one.prompt, one.new, now + allowances[name]))
    for _ in range(5000):
        if rank.scheduler.samples:
            rank.step()
    assert len(rank.first_tokens) == len(asked), "somebody starves"
    return arrivals, allowances


@settings(deadline=None, max_examples=200)
@given(st.lists(ASKED, min_size=2, max_size=8), st.fixed_dictionaries(SIZES), st.integers(0, 12))
def test_who_comes_later_than_an_allowance_is_not_served_before(asked, sizes, more_pages):
    """Also where pages are short, and some give theirs up."""
    least = max(-(-(one.prompt + one.new) // 4) for one in asked)
    rank = make_rank(least + more_pages, **sizes)
    arrivals, allowances = play(asked, rank, is_ordered=True)
    for a, arrival in arrivals.items():
        for b in arrivals:
            if arrivals[b] >= arrival + allowances[a]:
                assert rank.first_tokens[a] <= rank.first_tokens[b], f"{b} passes {a}"


@settings(deadline=None, max_examples=100)
@given(st.lists(ASKED, min_size=2, max_size=8), st.fixed_dictionaries(SIZES), st.booleans())
def test_of_equal_price_and_without_a_target_who_comes_first_is_served_first(asked, sizes, is_ordered):
    """With a target all prompts are as long, and all targets the same."""
    if is_ordered:
        asked = [Asked(one.after, asked[0].prompt, one.new, 3) for one in asked]
    rank = make_rank(**sizes)
    play(asked, rank, is_ordered=is_ordered)
    steps = [rank.first_tokens[str(number)] for number in range(len(asked))]
    assert steps == sorted(steps)


def test_a_text_comes_in_before_large_requests_that_wait():
    """Without dues they come in as they came."""
    for due, admitted in ((lambda s: s, ["text", "large 1"]), (lambda _: FIRST_COME, ["large 1", "large 2"])):
        rank = make_rank(max_running=1)
        rank.scheduler.add(make_sequence("runs", 4, 2, due(0.0)))
        rank.step()
        for name, at in (("large 1", 30.0), ("large 2", 31.0), ("text", 3.0)):
            rank.scheduler.add(make_sequence(name, 40, 1, due(at)))
        order = []
        for _ in range(12):
            order += [s.request_id for s in rank.scheduler.admit()]
            rank.step()
        assert order[:2] == admitted


def lengths(step: Step | None) -> dict[str, int]:
    return {} if step is None else {chunk.sequence.request_id: chunk.stop - chunk.start for chunk in step.prefill}


def test_a_text_has_the_first_tokens_of_a_step_and_is_not_held_up_by_what_goes_with_it():
    """Nobody is decoded, so a step may have 100 tokens of prompts; with the end of the text's go no more than 8."""
    rank = make_rank(max_prefill_tokens=100, chunk_tokens=8)
    rank.scheduler.add(make_sequence("large", 300, 1, 30.0))
    assert lengths(rank.step()) == {"large": 100}
    rank.scheduler.add(make_sequence("text", 5, 2, 3.0))
    rank.scheduler.admit()
    assert rank.scheduler.num_prefill_tokens == 8
    assert lengths(rank.step()) == {"text": 5, "large": 3}
    assert lengths(rank.step()) == {}, "the text's second token"
    assert lengths(rank.step()) == {"large": 100}


def test_a_text_whose_end_does_not_fit_has_the_whole_step():
    rank = make_rank(max_prefill_tokens=20, chunk_tokens=8)
    rank.scheduler.add(make_sequence("large", 300, 1, 30.0))
    rank.scheduler.add(make_sequence("text", 25, 2, 3.0))
    assert lengths(rank.step()) == {"text": 20}
    assert lengths(rank.step()) == {"text": 5, "large": 3}


@pytest.mark.parametrize("sampling", [{"max_new_tokens": 1}, {"pooling": Pooling()}])
def test_prompts_of_which_none_is_decoded_fill_a_step_whenever_each_is_due(sampling):
    rank = make_rank(max_prefill_tokens=100, chunk_tokens=8, max_running=50)
    for number in range(30):
        sequence = make_sequence(str(number), 5, 2, float(number))
        sequence.sampling = SamplingParams(**sampling)
        rank.scheduler.add(sequence)
    assert lengths(rank.step()) == {str(number): 5 for number in range(20)}


def test_first_come_first_served_fills_a_step_whoever_ends_in_it():
    rank = make_rank(max_prefill_tokens=20, chunk_tokens=8)
    for name in ("text", "large"):
        rank.scheduler.add(make_sequence(name, 5 if name == "text" else 300))
    assert lengths(rank.step()) == {"text": 5, "large": 15}


def test_the_last_to_arrive_gives_its_pages_up_also_the_most_urgent_and_comes_back_in_its_place():
    """4 pages of 4. `late` came last and is due first: as it would be decoded before `early` needs the page, it must
    not be among those that are decoded then. Behind it waits one that is due later, and came in between."""
    rank = make_rank(4, max_running=2)
    early, between, late = (
        make_sequence("early", 4, 9, 30.0),
        make_sequence("between", 4, 1, 20.0),
        make_sequence("late", 2, 9, 10.0),
    )
    rank.scheduler.add(early)
    rank.scheduler.admit()
    for sequence in (between, late):
        rank.scheduler.add(sequence)
    assert [s.request_id for s in rank.scheduler.admit()] == ["late"]
    while not late.num_preempted:
        step = rank.step()
    assert step is not None
    assert [s.request_id for s in step.decode] == ["early"]
    assert [s.request_id for s in rank.scheduler.waiting] == ["late", "between"]
    while rank.step() is not None:
        continue
    assert (early.num_preempted, len(early.generated), len(late.generated)) == (0, 9, 9)
    assert list(rank.first_tokens) == ["late", "early", "between"]
