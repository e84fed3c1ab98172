"""The machine of `test_session_pair.py` on long random walks: no shrinking, but many more steps in the same time.

`walk(seed)` alone repeats one that failed.
"""

from __future__ import annotations

from random import Random

from hypothesis import settings

from qwen3vl_disagg.protocol import room
from tests.properties.test_session_pair import MAX_RUNS, SessionPair

NUM_WALKS = 10 * settings().max_examples
NUM_STEPS = 60


def _items(rng: Random) -> list[int]:
    return [rng.randint(1, 12) for _ in range(rng.randint(0, 3))]


def _cached(rng: Random) -> int:
    return rng.choice([0, rng.randint(0, 36)])


def _step(machine: SessionPair, rng: Random, num_faults: float) -> None:
    def number() -> int:
        return rng.randint(0, 2**16)

    def rank() -> int:
        return rng.randint(0, 1)

    def end() -> str:
        return rng.choice(["language", "encode"])

    x = rng.random()
    if x < 0.25:
        machine.go_on(number(), rng.randint(2, 25))
    elif x < 0.4:
        machine.move(number())
    elif x < 0.5:
        machine.submit(_items(rng), rng.randint(0, 7), _cached(rng))
    elif x < 0.55:
        machine.read_a_few_rows(number(), rng.randint(1, 5))
    elif x < 0.6:
        machine.finish(number())
    elif x < 0.66:
        machine.time_passes(rng.choice([0.3, 1.0, 1.0, 2.5, 6.0, 21.0, 45.0]))
    elif x < 0.69:
        machine.preempt(number(), is_told=rng.random() < 0.7)
    elif x < 0.72:
        machine.admit_again(number(), _cached(rng))
    elif x < 0.72 + 0.28 * num_faults:
        faults = [
            lambda: machine.cancel(number()),
            lambda: machine.encode_fails(rank(), rng.choice(["input", "failed", "failed"])),
            lambda: machine.payload_fails(rank(), rng.choice(["digest", "broken", "broken"])),
            lambda: machine.link_breaks(rank(), end()),
            lambda: machine.link_breaks(rank(), end()),
            lambda: machine.kill(rank=rank(), loses_frames=rng.random() < 0.5),
            lambda: machine.a_frame_comes_twice(rank(), end()),
            lambda: machine.an_old_frame_comes_again(number()),
            lambda: machine.a_frame_is_lost(rank(), end(), number()),
        ]
        rng.choice(faults)()


def walk(seed: int) -> None:
    rng, machine = Random(seed), SessionPair()
    machine.build(
        block_size=rng.randint(1, 3),
        blocks=rng.randint(1, 4),
        deepstack_blocks=rng.randint(1, 8),
        slots=rng.randint(1, 3),
        run_rows=rng.choice([1, 2, 10**6]),
        has_deepstack=rng.random() < 0.7,
        max_runs=rng.choice([MAX_RUNS, MAX_RUNS, 2]),
        requests=[(_items(rng), _cached(rng)) for _ in range(rng.randint(1, 3))],
        which=rng.randint(0, 7),
    )
    num_faults = rng.random()
    try:
        for _ in range(NUM_STEPS):
            _step(machine, rng, num_faults)
        machine.teardown()
    finally:
        room.MAX_RUNS = MAX_RUNS


def test_random_walks():
    for seed in range(NUM_WALKS):
        try:
            walk(seed)
        except AssertionError as error:
            raise AssertionError(f"walk({seed}): {error}") from error
