"""One language rank and two encode ranks under any sequence of requests, progress and faults.

After every step: I1 to I10, I12, I13, I16. At the end faults stop: all requests that are still there get all their rows
(I11), and when they are over everything is back where it was (I15).
"""

from __future__ import annotations

from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from qwen3vl_disagg.protocol import room as room_module
from qwen3vl_disagg.protocol.layout import RUN_BYTES, RowSizes
from tests.properties.session_parts import LIMITS
from tests.properties.session_world import RANKS, World

MAX_RUNS = room_module.MAX_RUNS
ranks = st.sampled_from(RANKS)
seeds = st.integers(0, 2**16)
items = st.lists(st.integers(1, 12), max_size=3)
cached = st.one_of(st.just(0), st.integers(0, 36))
"""Tokens of the prompt in the prefix cache."""


class SessionPair(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 3),
        blocks=st.integers(1, 4),
        deepstack_blocks=st.integers(1, 8),
        slots=st.integers(1, 3),
        run_rows=st.sampled_from([1, 2, 10**6]),
        has_deepstack=st.booleans(),
        max_runs=st.sampled_from([MAX_RUNS, MAX_RUNS, 2]),
        requests=st.lists(st.tuples(items, cached), min_size=1, max_size=3),
        which=st.integers(0, 7),
    )
    def build(self, block_size, blocks, deepstack_blocks, slots, run_rows, has_deepstack, max_runs, requests, which):
        room_module.MAX_RUNS = max(max_runs, block_size)
        self.world = World(
            block_size=block_size,
            blocks=blocks,
            deepstack_blocks=deepstack_blocks,
            slots=slots,
            row_sizes=RowSizes(RUN_BYTES // run_rows, 4, 12, 64, 8 if has_deepstack else 0),
        )
        for rank in RANKS:
            self.world.link_up(rank)
        for rows, found in requests:
            self.world.submit(rows, which, found)

    # ---- progress ----

    @rule(rows=items, which=st.integers(0, 7), found=cached)
    def submit(self, rows, which, found):
        if len(self.world.engine.known) < 5:
            self.world.submit(rows, which, found)

    @rule(number=seeds, is_told=st.booleans())
    def preempt(self, number, is_told):
        if known := list(self.world.engine.known):
            self.world.preempt(known[number % len(known)], is_told=is_told)

    @rule(number=seeds, found=cached)
    def admit_again(self, number, found):
        if away := [r for r, sequence in self.world.engine.known.items() if not sequence.is_admitted]:
            self.world.admit_again(away[number % len(away)], found)

    @rule(number=seeds)
    def move(self, number):
        moves = self.world.moves()
        if moves:
            do, args = moves[number % len(moves)]
            do(*args)

    @rule(seed=seeds, most=st.integers(2, 40))
    def go_on(self, seed, most):
        rng = Random(seed)
        for _ in range(most):
            moves = self.world.moves()
            if moves:
                do, args = rng.choice(moves)
                do(*args)

    @rule(number=seeds, most=st.integers(1, 5))
    def read_a_few_rows(self, number, most):
        if known := list(self.world.engine.known):
            self.world.step(known[number % len(known)], most)

    @rule(number=seeds)
    def finish(self, number):
        if done := [r for r, sequence in self.world.engine.known.items() if sequence.is_prefilled]:
            self.world.finish(done[number % len(done)])

    @rule(seconds=st.sampled_from([0.3, 1.0, 1.0, 2.5, 6.0, 21.0, 45.0]))
    def time_passes(self, seconds):
        self.world.tick(seconds)

    # ---- faults ----

    @rule(number=seeds)
    def cancel(self, number):
        if known := list(self.world.router.requests):
            self.world.cancel(known[number % len(known)])

    @rule(rank=ranks, kind=st.sampled_from(["input", "failed", "failed"]))
    def encode_fails(self, rank, kind):
        if encoding := self.world.encodes[rank].encoding:
            self.world.encoded(rank, encoding[0], kind)

    @rule(rank=ranks, how=st.sampled_from(["digest", "broken", "broken"]))
    def payload_fails(self, rank, how):
        for link in self.world.links:
            if link.rank == rank and link.receives and (link.arriving or how == "broken"):
                self.world.payload_end(link, how)
                return

    @rule(rank=ranks, end=st.sampled_from(["language", "encode"]))
    def link_breaks(self, rank, end):
        link = self.world.link_of(rank, end)
        if link is not None:
            self.world.notice(link, end)

    @rule(rank=ranks, loses_frames=st.booleans())
    def kill(self, rank, loses_frames):
        self.world.kill(rank, loses_frames=loses_frames)

    @rule(rank=ranks, end=st.sampled_from(["language", "encode"]))
    def a_frame_comes_twice(self, rank, end):
        link = self.world.link_of(rank, end)
        if link is not None and end in link.last:
            self.world.deliver_again(rank, end, link.last[end])

    @rule(number=seeds)
    def an_old_frame_comes_again(self, number):
        if frames := self.world.old_frames:
            rank, end, frame = frames[number % len(frames)]
            if type(frame.body).__name__ != "Stale":
                self.world.deliver_again(rank, end, frame)

    @rule(rank=ranks, end=st.sampled_from(["language", "encode"]), number=seeds)
    def a_frame_is_lost(self, rank, end, number):
        for link in self.world.links:
            places = [i for i, frame in enumerate(link.to[end]) if not isinstance(frame, str)]
            if link.rank == rank and places:
                del link.to[end][places[number % len(places)]]
                return

    # ---- the end ----

    def teardown(self):
        if not hasattr(self, "world"):
            return
        try:
            self._end()
        finally:
            room_module.MAX_RUNS = MAX_RUNS

    def _end(self):
        world, rng = self.world, Random(0)
        world.router.is_patient = True
        for _ in range(200):  # seconds: longer than all deadlines together
            world.settle(rng)
            if all(sequence.is_prefilled for sequence in world.engine.known.values()):
                break
            world.tick(1.0)
        else:
            held = [s for request in world.language.requests.values() for s in request.sessions]
            raise AssertionError(f"I11: no progress; {[(s.key, s.state, s.received, s.total) for s in held]}")
        for request_id in list(world.engine.known):
            world.finish(request_id)
        for seconds in (0.0, 1.1, 1.1, LIMITS.lease_s, 1.1):
            world.tick(seconds)
            world.settle(rng)
        assert world.language.is_idle, "I15"
        assert not any(encode.encoding or encode.encoded for encode in world.encodes), "I15: rows in memory"
        world.tick(1e6)  # items that were never granted, and whose end was told over a link that died, have a deadline
        assert all(encode.sessions.is_idle for encode in world.encodes), "I15"
        assert not world.running
        assert not world.router.requests


TestSessionPair = SessionPair.TestCase
NUM_EXAMPLES = settings().max_examples
TestSessionPair.settings = settings(max_examples=max(NUM_EXAMPLES, min(8 * NUM_EXAMPLES, 1000)))
"""These are cheap: 240 (dev), 800 (ci), 2000 (nightly)."""
