"""The allocator's invariants of the transfer protocol, after every step of random histories.

I1 free + owned + quarantined = total, disjoint. I2 only the owner frees, once, at its generation. I3 a quarantined
block is never granted. I16 a grant takes blocks, DeepStack blocks and slots together or nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwen3vl_disagg.protocol.allocator import POOLS, BlockAllocator, Want

wants = st.builds(Want, rows=st.integers(0, 4), deepstack=st.integers(0, 4), slots=st.integers(0, 2))


class AllocatorHistory(RuleBasedStateMachine):
    """Grants, frees, quarantines and forgeries against a model of plain dicts: generation -> lease."""

    @initialize(blocks=st.integers(1, 8), deepstack=st.integers(0, 6), slots=st.integers(1, 4))
    def build(self, blocks, deepstack, slots):
        self.allocator = BlockAllocator(num_blocks=blocks, num_deepstack_blocks=deepstack, num_slots=slots)
        self.totals = {"rows": blocks, "deepstack": deepstack, "slots": slots}
        self.owned, self.quarantined, self.ended = {}, {}, []

    def held(self, pool):
        leases = [*self.owned.values(), *self.quarantined.values()]
        return [i for lease in leases for i in getattr(lease, pool)]

    @rule(owner=st.sampled_from("abc"), wanted=st.lists(wants, min_size=1, max_size=3))
    def grant(self, owner, wanted):
        fits = all(
            sum(getattr(want, pool) for want in wanted) <= self.totals[pool] - len(self.held(pool)) for pool in POOLS
        )
        known = {lease.generation for lease in [*self.owned.values(), *self.quarantined.values(), *self.ended]}
        leases = self.allocator.grant(owner, *wanted)
        assert (leases is not None) == fits
        if leases is None:
            return
        assert len(leases) == len(wanted)
        for lease, want in zip(leases, wanted, strict=True):
            assert lease.owner == owner
            assert lease.generation > max(known, default=-1)
            for pool in POOLS:
                ids = getattr(lease, pool)
                assert len(set(ids)) == len(ids) == getattr(want, pool)
                assert list(ids) == sorted(ids), "neighbours would not make one run"
                assert not set(ids) & set(self.held(pool)), f"{pool} granted twice or out of quarantine"
                assert all(0 <= i < self.totals[pool] for i in ids)
            known.add(lease.generation)
            self.owned[lease.generation] = lease

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), into_quarantine=st.booleans())
    def end(self, data, into_quarantine):
        """One lease of an owner may go while its others stay."""
        lease = self.owned.pop(data.draw(st.sampled_from(sorted(self.owned))))
        if into_quarantine:
            self.allocator.quarantine(lease)
            self.quarantined[lease.generation] = lease
        else:
            self.allocator.free(lease)
            self.ended.append(lease)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def release(self, data):
        lease = self.quarantined.pop(data.draw(st.sampled_from(sorted(self.quarantined))))
        self.allocator.release(lease)
        self.ended.append(lease)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def reclaim(self, data):
        """Out of quarantine, back to the owner it was taken from, as if it had never been there."""
        lease = self.quarantined.pop(data.draw(st.sampled_from(sorted(self.quarantined))))
        self.allocator.reclaim(lease)
        self.owned[lease.generation] = lease

    @precondition(lambda self: self.ended or self.quarantined)
    @rule(data=st.data(), how=st.sampled_from(["free", "quarantine", "release", "reclaim"]))
    def give_back_twice(self, data, how):
        lease = data.draw(st.sampled_from([*self.ended, *self.quarantined.values()]))
        if how in ("release", "reclaim") and lease.generation in self.quarantined:
            return
        with pytest.raises(ValueError, match=f"{lease.generation} of {lease.owner}"):
            getattr(self.allocator, how)(lease)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), how=st.sampled_from(["free", "quarantine", "release", "reclaim"]))
    def give_back_what_nobody_was_given(self, data, how):
        lease = self.owned[data.draw(st.sampled_from(sorted(self.owned)))]
        forgeries = [
            replace(lease, generation=lease.generation + 100),
            replace(lease, owner="nobody"),
            replace(lease, rows=(*lease.rows, 0)),
            replace(lease, slots=(*lease.slots, 0)),
        ]
        if how in ("release", "reclaim"):
            forgeries.append(lease)  # owned, not in quarantine
        for forgery in forgeries:
            with pytest.raises(ValueError, match=r"not owned|not in quarantine"):
                getattr(self.allocator, how)(forgery)

    @invariant()
    def ids_add_up(self):
        for pool in POOLS:
            owned = [i for lease in self.owned.values() for i in getattr(lease, pool)]
            quarantined = [i for lease in self.quarantined.values() for i in getattr(lease, pool)]
            free = self.allocator.free_ids(pool)
            assert sorted([*free, *owned, *quarantined]) == list(range(self.totals[pool]))
            assert self.allocator.counts(pool) == (len(free), len(owned), len(quarantined))
            assert self.allocator.num_free(pool) == len(free)
        assert dict(self.allocator.leases) == self.owned
        assert dict(self.allocator.quarantined) == self.quarantined
        assert self.allocator.is_idle == (not self.owned and not self.quarantined)

    def teardown(self):
        """Whatever happened, everything can be given back, and then the whole pool can be granted at once."""
        if not hasattr(self, "allocator"):
            return
        for lease in self.owned.values():
            self.allocator.free(lease)
        for lease in self.quarantined.values():
            self.allocator.release(lease)
        [everything] = self.allocator.grant("all", Want(**self.totals))
        assert all(sorted(getattr(everything, pool)) == list(range(self.totals[pool])) for pool in POOLS)


TestAllocatorHistory = AllocatorHistory.TestCase


@pytest.mark.parametrize("short", POOLS)
def test_a_grant_that_lacks_one_pool_takes_nothing_of_the_others(short):
    """Also when it is only the second want that does not fit."""
    allocator = BlockAllocator(num_blocks=4, num_deepstack_blocks=4, num_slots=4)
    first = Want(rows=2, deepstack=2, slots=2)
    second = Want(**{"rows": 2, "deepstack": 2, "slots": 2, short: 3})
    assert allocator.grant("r", first, second) is None
    assert all(allocator.counts(pool) == (4, 0, 0) for pool in POOLS)
    assert allocator.is_idle
    assert allocator.grant("r", first, first) is not None


def test_pools_need_a_block_and_a_slot():
    for sizes in ((0, 0, 1), (1, 0, 0), (1, -1, 1)):
        with pytest.raises(ValueError, match="at least one block and one slot"):
            BlockAllocator(num_blocks=sizes[0], num_deepstack_blocks=sizes[1], num_slots=sizes[2])


def test_fresh_blocks_are_neighbours():
    allocator = BlockAllocator(num_blocks=8, num_deepstack_blocks=8, num_slots=1)
    [first] = allocator.grant("a", Want(rows=3))
    [second] = allocator.grant("b", Want(rows=3))
    assert (first.rows, second.rows) == ((0, 1, 2), (3, 4, 5))
    allocator.free(first)
    [third] = allocator.grant("c", Want(rows=3))
    assert third.rows == (0, 1, 2)


def test_only_the_lease_itself_ends_its_quarantine():
    allocator = BlockAllocator(num_blocks=4, num_deepstack_blocks=4, num_slots=2)
    mine, other = allocator.grant("mine", Want(1, 1, 1), Want(1, 1, 1))
    allocator.quarantine(mine)
    with pytest.raises(ValueError, match="not in quarantine"):
        allocator.release(replace(mine, rows=other.rows))
    with pytest.raises(TypeError):
        allocator.leases[7] = mine  # type: ignore[index]
