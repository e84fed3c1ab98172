"""The agreement on steps: hand-worked cases, and ranks that report in any order while work comes and goes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.parallel.lockstep import Lockstep, Outlook, PaceLimits, StepPlan
from qwen3vl_disagg.parallel.sizes import padded_rows

LIMITS = PaceLimits(chunk_tokens=64, max_prefill_tokens=4096)


def make(num_ranks: int, choose=lambda rows, num_rows: "gather") -> Lockstep:
    return Lockstep(num_ranks, LIMITS, choose)


def test_nobody_steps_while_nobody_has_work():
    lockstep = make(2)
    assert lockstep.report(0, Outlook(step=1)) is None
    assert lockstep.report(1, Outlook(step=1)) is None
    # Rank 0 gets a request; rank 1 has said all there is to say.
    assert lockstep.report(0, Outlook(step=1, prefill=10)) == StepPlan(step=1, num_rows=16, prefill=4096)


def test_a_step_waits_for_every_rank():
    lockstep = make(3)
    assert lockstep.report(0, Outlook(step=1, decode=3)) is None
    assert lockstep.report(2, Outlook(step=1)) is None
    assert lockstep.report(0, Outlook(step=1, decode=5)) is None  # it speaks again, still without rank 1
    assert lockstep.report(1, Outlook(step=1)) == StepPlan(step=1, num_rows=8)
    assert lockstep.report(1, Outlook(step=1, prefill=9)) is None  # too late for step 1, and no word about step 2
    assert [lockstep.report(rank, Outlook(step=2, decode=1)) for rank in (0, 2)] == [None] * 2
    assert lockstep.report(1, Outlook(step=2)) == StepPlan(step=2, num_rows=2)


def test_prompts_and_decoding_take_turns_over_all_ranks():
    """Rank 0 has a long prompt, rank 1 decodes: a chunk, a step without prompts, a chunk, .."""
    lockstep = make(2)
    plans = []
    for step in range(1, 5):
        lockstep.report(0, Outlook(step=step, prefill=1000))
        plans.append(lockstep.report(1, Outlook(step=step, decode=2)))
    assert [(plan.prefill, plan.num_rows) for plan in plans] == [(64, 64), (0, 2), (64, 64), (0, 2)]


def test_a_prompt_has_all_of_the_step_while_nobody_decodes():
    lockstep = make(2)
    for step in (1, 2):
        lockstep.report(1, Outlook(step=step))
        assert lockstep.report(0, Outlook(step=step, prefill=9000)).prefill == 4096


def test_how_rows_travel_is_decided_from_what_each_rank_brings():
    seen = []

    def choose(rows, num_rows):
        seen.append((list(rows), num_rows))
        return "all_to_all"

    lockstep = make(3, choose)
    lockstep.report(0, Outlook(step=1, prefill=200))
    lockstep.report(1, Outlook(step=1))
    assert lockstep.report(2, Outlook(step=1, decode=3)).kind == "all_to_all"
    assert seen == [([64, 0, 3], 64)]


def test_who_does_not_fit_is_refused_by_name():
    lockstep = make(2)
    lockstep.join(0)
    with pytest.raises(HandshakeError, match="rank: expected 'one of \\[1\\]', got 0"):
        lockstep.join(0)
    with pytest.raises(HandshakeError, match="rank"):
        lockstep.join(2)
    lockstep.join(1)
    assert [lockstep.leave(0), lockstep.leave(0), lockstep.leave(1)] == [False, False, True]


@given(st.integers(1, 5000))
def test_buckets_are_few_and_never_too_small(num_rows):
    size = padded_rows(num_rows)
    assert size >= num_rows
    assert padded_rows(size) == size
    assert size <= max(2, 2 * num_rows) if num_rows < 32 else size <= num_rows * 1.5 + 1


@dataclass(eq=False)
class Rank:
    """What an engine would do: prompts to run, tokens to decode for each, reports when its outlook changes."""

    prompts: list[tuple[int, int]] = field(default_factory=list)
    decoding: list[int] = field(default_factory=list)
    step: int = 1
    reported: Outlook | None = None
    plan: StepPlan | None = None
    long_steps: int = 0
    """Steps with somebody's prompts since this rank's last decode step, while it decodes."""

    def outlook(self) -> Outlook:
        return Outlook(step=self.step, prefill=sum(left for left, _ in self.prompts), decode=len(self.decoding))

    def run(self) -> None:
        plan, self.plan = self.plan, None
        assert plan.step == self.step
        budget = min(plan.prefill, plan.num_rows)
        if budget and self.prompts:
            if self.decoding:
                assert plan.prefill <= LIMITS.chunk_tokens
                self.long_steps += 1
                assert self.long_steps < 2, "two steps with prompts between two tokens"
            left, new = self.prompts.pop(0)
            if left > budget:
                self.prompts.insert(0, (left - budget, new))
            elif new:
                self.decoding.append(new)
        else:
            assert len(self.decoding) <= plan.num_rows
            self.long_steps = 0
            self.decoding = [new - 1 for new in self.decoding if new > 1]
        self.step += 1
        self.reported = None


@given(st.data())
def test_ranks_in_any_order_do_all_work_and_stay_in_step(data):
    num_ranks = data.draw(st.integers(1, 4))
    ranks = [Rank() for _ in range(num_ranks)]
    lockstep = make(num_ranks)
    requests = st.tuples(st.integers(0, num_ranks - 1), st.integers(1, 200), st.integers(0, 4))
    coming = data.draw(st.lists(requests, max_size=8))
    for _ in range(2000):
        can = [("report", rank) for rank in ranks if rank.plan is None and rank.outlook() != rank.reported]
        can += [("run", rank) for rank in ranks if rank.plan is not None]
        can += [("come", ranks[coming[0][0]])] if coming else []
        if not can:
            break
        what, rank = can[data.draw(st.integers(0, len(can) - 1))]
        if what == "come":
            _, tokens, new = coming.pop(0)
            rank.prompts.append((tokens, new))
        elif what == "run":
            rank.run()
        else:
            rank.reported = rank.outlook()
            plan = lockstep.report(ranks.index(rank), rank.reported)
            if plan is not None:
                assert all(r.step == plan.step and r.plan is None for r in ranks)
                for other in ranks:
                    other.plan = plan
    assert not coming
    assert not any(rank.prompts or rank.decoding for rank in ranks)
    assert len({rank.step for rank in ranks}) == 1


def test_the_chunk_is_the_least_that_a_rank_measured():
    lockstep = make(3)
    lockstep.report(0, Outlook(step=1, prefill=1000, chunk=96))
    lockstep.report(1, Outlook(step=1, decode=2))  # without prompts it learns nothing
    assert lockstep.report(2, Outlook(step=1, prefill=9, chunk=48)).prefill == 48
    for rank in range(2):
        lockstep.report(rank, Outlook(step=2, decode=1))
    assert lockstep.report(2, Outlook(step=2)).prefill == 0
    for rank in range(2):
        lockstep.report(rank, Outlook(step=3, prefill=1000, chunk=96))
    assert lockstep.report(2, Outlook(step=3)).prefill == 4096
