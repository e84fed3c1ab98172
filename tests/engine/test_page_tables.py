"""Page tables that are written where they are new, against tables from lists."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.page_tables import PageTables
from qwen3vl_disagg.engine.sequence import Sequence


def make_sequence(name: str) -> Sequence:
    ids, positions = [1], torch.zeros(3, 1, dtype=torch.int64)
    return Sequence(name, ids, [], SamplingParams(), positions=positions, delta=0, seed=0)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["grow", "leave", "end"]), st.integers(1, 40)), max_size=40)
)
def test_whoever_comes_grows_leaves_and_comes_back(changes):
    tables = PageTables(6, 1700)
    sequences = {n: make_sequence(str(n)) for n in range(6)}
    next_page = 0
    for number, what, count in changes:
        sequence = sequences[number]
        if what == "grow":
            sequence.pages += range(next_page, next_page + count)
            next_page += count
        elif what == "leave":
            sequence.leave()
            sequence.num_preempted += 1
        else:
            sequences[number] = make_sequence(str(number))
        there = [one for one in sequences.values() if one.pages]
        if there:
            longest = max(len(one.pages) for one in there)
            expected = [one.pages + [0] * (longest - len(one.pages)) for one in there[::-1]]
            found = tables.of(there[::-1])
            assert found.tolist() == expected


def test_a_step_writes_what_is_new():
    tables, sequence = PageTables(1, 6000), make_sequence("a")
    sequence.pages += range(5000)
    tables.of([sequence])
    sequence.pages.append(7)
    tables._array[0, 17] = -1  # what is written already is not written again
    assert tables.of([sequence])[0, [16, 17, 5000]].tolist() == [16, -1, 7]
