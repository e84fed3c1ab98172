"""Where a visual item's rows stand in a prompt, against a plain list of its placeholders."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import VisualItem


def make_item(runs: tuple[int, ...], run_rows: int) -> VisualItem:
    return VisualItem(
        modality="video" if len(runs) > 1 else "image",
        digest="",
        num_bytes=1,
        grid=(len(runs), 2, 2 * run_rows),
        num_rows=len(runs) * run_rows,
        offset=runs[0],
        param="",
        run_offsets=runs if len(runs) > 1 else (),
    )


def test_the_example_of_the_docstring():
    item = make_item((5, 14), 4)
    assert (item.stop, item.token_of(3), item.token_of(4), item.rows_before(12)) == (18, 8, 14, 4)
    assert list(item.stretches(2, 7)) == [(2, 4, 7), (4, 7, 14)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 6))
def test_rows_and_tokens(gaps, run_rows, start):
    runs, placeholders = [], []
    for gap in gaps:
        start += gap
        runs.append(start)
        placeholders += range(start, start + run_rows)
        start += run_rows
    item = make_item(tuple(runs), run_rows)
    assert item.stop == start
    assert [item.token_of(row) for row in range(item.num_rows + 1)] == [*placeholders, start]
    for index in range(start + 3):
        assert item.rows_before(index) == sum(token < index for token in placeholders)
    for low in range(item.num_rows + 1):
        for high in range(low, item.num_rows + 1):
            found = [token + n for a, b, token in item.stretches(low, high) for n in range(b - a)]
            assert found == placeholders[low:high]


def test_the_content_is_all_that_rows_depend_on():
    item = make_item((5, 14), 4)
    for change in ({"digest": "x"}, {"grid": (1, 2, 16)}, {"frames": (0, 1)}, {"is_frame_list": True}):
        assert msgspec.structs.replace(item, **change).content != item.content
    for change in ({"offset": 6, "run_offsets": (6, 15)}, {"param": "x"}):
        assert msgspec.structs.replace(item, **change).content == item.content
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(item), type=VisualItem) == item
