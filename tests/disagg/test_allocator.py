"""The allocator's invariants of the transfer protocol, after every step of random histories.

I1 free + owned + quarantined = total, disjoint. I2 only the owner frees, once, at its generation. I3 a quarantined
block is never granted. I16 a grant takes blocks, DeepStack blocks and a slot together or nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwen3vl_disagg.disagg.allocator import POOLS, BlockAllocator, Lease


class AllocatorHistory(RuleBasedStateMachine):
    """Grants, frees, quarantines and forgeries against a model that only keeps who holds what."""

    @initialize(blocks=st.integers(1, 6), deepstack=st.integers(0, 6), slots=st.integers(1, 4))
    def build(self, blocks, deepstack, slots):
        self.allocator = BlockAllocator(num_blocks=blocks, num_deepstack_blocks=deepstack, num_slots=slots)
        self.totals = {"rows": blocks, "deepstack": deepstack, "slots": slots}
        self.owned: dict[str, Lease] = {}
        self.quarantined: list[Lease] = []
        self.ended: list[Lease] = []

    def held(self, pool):
        return [unit for lease in [*self.owned.values(), *self.quarantined] for unit in lease.of(pool)]

    @rule(owner=st.sampled_from("abcdef"), blocks=st.integers(0, 4), deepstack=st.integers(0, 4))
    def grant(self, owner, blocks, deepstack):
        if owner in self.owned:
            with pytest.raises(ValueError, match="owns a lease"):
                self.allocator.grant(owner, blocks, deepstack)
            return
        wanted = {"rows": blocks, "deepstack": deepstack, "slots": 1}
        fits = all(self.totals[pool] - len(self.held(pool)) >= count for pool, count in wanted.items())
        lease = self.allocator.grant(owner, blocks, deepstack)
        assert (lease is not None) == fits
        if lease is None:
            return
        for pool, count in wanted.items():
            units = lease.of(pool)
            assert len(set(units)) == len(units) == count
            assert not set(units) & set(self.held(pool)), f"{pool} granted twice or out of quarantine"
            assert all(0 <= unit < self.totals[pool] for unit in units)
        assert lease.owner == owner
        assert all(lease.generation > other.generation for other in [*self.owned.values(), *self.ended])
        self.owned[owner] = lease

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), into_quarantine=st.booleans())
    def end(self, data, into_quarantine):
        lease = self.owned.pop(data.draw(st.sampled_from(sorted(self.owned))))
        self.ended.append(lease)
        if into_quarantine:
            self.allocator.quarantine(lease)
            self.quarantined.append(lease)
        else:
            self.allocator.free(lease)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def release(self, data):
        lease = data.draw(st.sampled_from(self.quarantined))
        self.quarantined.remove(lease)
        self.allocator.release(lease)

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), how=st.sampled_from(["free", "quarantine", "release"]))
    def give_back_twice(self, data, how):
        lease = data.draw(st.sampled_from(self.ended))
        if how == "release" and lease in self.quarantined:
            return
        with pytest.raises(ValueError, match=lease.owner):
            getattr(self.allocator, how)(lease)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), how=st.sampled_from(["free", "quarantine"]))
    def give_back_anothers(self, data, how):
        lease = self.owned[data.draw(st.sampled_from(sorted(self.owned)))]
        forgeries = [
            replace(lease, generation=lease.generation + 1),
            replace(lease, owner="nobody"),
            replace(lease, rows=(*lease.rows, 0)),
            replace(lease, slot=lease.slot + 1),
        ]
        for forgery in forgeries:
            with pytest.raises(ValueError, match="not owned"):
                getattr(self.allocator, how)(forgery)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release_what_is_not_in_quarantine(self, data):
        lease = self.owned[data.draw(st.sampled_from(sorted(self.owned)))]
        with pytest.raises(ValueError, match="not in quarantine"):
            self.allocator.release(lease)

    @invariant()
    def units_add_up(self):
        for pool in POOLS:
            owned = sum(len(lease.of(pool)) for lease in self.owned.values())
            held = sum(len(lease.of(pool)) for lease in self.quarantined)
            assert self.allocator.counts(pool) == (self.totals[pool] - owned - held, owned, held)
            assert len(set(self.held(pool))) == owned + held
        assert self.allocator.is_idle == (not self.owned and not self.quarantined)
        for owner in "abcdef":
            assert self.allocator.owned(owner) == self.owned.get(owner)

    def teardown(self):
        """Whatever happened, everything can be given back, and then the whole pool can be granted at once."""
        if not hasattr(self, "allocator"):
            return
        for lease in self.owned.values():
            self.allocator.free(lease)
        for lease in self.quarantined:
            self.allocator.release(lease)
        everything = self.allocator.grant("all", self.totals["rows"], self.totals["deepstack"])
        assert everything is not None
        assert sorted(everything.rows) == list(range(self.totals["rows"]))
        assert sorted(everything.deepstack) == list(range(self.totals["deepstack"]))


TestAllocatorHistory = AllocatorHistory.TestCase


@pytest.mark.parametrize("short", POOLS)
def test_a_grant_that_lacks_one_pool_takes_nothing_of_the_others(short):
    allocator = BlockAllocator(num_blocks=4, num_deepstack_blocks=4, num_slots=1)
    wanted = {"rows": 2, "deepstack": 2} | ({short: 5} if short != "slots" else {})
    taken = allocator.grant("first", 0, 0) if short == "slots" else None
    before = {pool: allocator.counts(pool) for pool in POOLS}
    assert allocator.grant("r", wanted["rows"], wanted["deepstack"]) is None
    assert {pool: allocator.counts(pool) for pool in POOLS} == before
    assert allocator.owned("r") is None
    assert (taken is None) == (short != "slots")


def test_what_can_never_fit_is_known():
    allocator = BlockAllocator(num_blocks=4, num_deepstack_blocks=2, num_slots=1)
    assert allocator.could_ever_fit(4, 2)
    assert not allocator.could_ever_fit(5, 0)
    assert not allocator.could_ever_fit(0, 3)
    with pytest.raises(ValueError, match="at least one block"):
        BlockAllocator(num_blocks=0, num_deepstack_blocks=0, num_slots=1)


def test_only_the_lease_itself_ends_its_quarantine():
    allocator = BlockAllocator(num_blocks=4, num_deepstack_blocks=4, num_slots=2)
    mine, other = allocator.grant("mine", 1, 1), allocator.grant("other", 1, 1)
    assert mine is not None
    assert other is not None
    allocator.quarantine(mine)
    with pytest.raises(ValueError, match="not in quarantine"):
        allocator.release(replace(mine, rows=other.rows))
