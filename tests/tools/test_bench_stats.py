"""Figures from raw times."""

import pytest

from tools.bench_host import PARTS, SETTINGS, filled_engine, measure
from tools.bench_stats import decode_rate, gaps, percentile, whole_rate


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (10, 1), (11, 2), (50, 5), (51, 6), (90, 9), (99, 10), (100, 10)]
)
def test_percentile_is_a_value_that_was_seen(percent, expected):
    assert percentile([3, 1, 2, 5, 4, 10, 9, 8, 7, 6], percent) == expected


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1], -1), ([1], 101)])
def test_no_percentile(values, percent):
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


def test_decode_rate_of_one_request():
    assert decode_rate([[1.0, 1.5, 2.0, 3.0]]) == 1.5


def test_decode_rate_counts_while_the_batch_is_full():
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0, 6.0]
    assert decode_rate([early, late]) == (2 + 2) / 2.0
    assert whole_rate([early, late]) == 8 / 6.0


def test_no_time_in_which_all_decode():
    with pytest.raises(ValueError, match=r"end at 1\.000 s .* begun at 2\.000 s"):
        decode_rate([[0.0, 1.0], [2.0, 3.0]])


def test_gaps():
    assert gaps([[1.0, 1.5, 3.5], [7.0], [2.0, 2.25]]) == [0.5, 2.0, 0.25]


def test_a_step_without_a_model_is_measured_part_by_part():
    """Real engine, scheduler and sampler: all requests decode, one more waits for pages."""
    found = measure(40, 3, 4, SETTINGS["all"])
    assert set(found) == {"step", *PARTS}
    assert all(value >= 0 for value in found.values())
    assert found["step"] > found["sample"] > 0
    engine = filled_engine(40, 3, 20, SETTINGS["repetition"])
    assert (engine.scheduler.num_decoding, len(engine.scheduler.waiting)) == (3, 1)
