"""Positions against the reference and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.processing import item_positions, mrope_positions

IMAGE, VIDEO, START, END = 90, 91, 92, 93


def lay_out(parts: list, *, is_wrapped: bool = False) -> tuple[list[int], list[VisualItem]]:
    """Numbers are runs of text, pairs are images of that many merged rows and columns, triples clips of that many
    frames, rows and columns: each frame behind a timestamp of 2 to 4 tokens."""
    ids: list[int] = []
    items = []
    for part in parts:
        if isinstance(part, int):
            ids += [1] * part
            continue
        if len(part) == 3:
            frames, rows = part[0], part[1] * part[2]
            ids += [START] * is_wrapped
            runs = []
            for frame in range(frames):
                ids += [1] * (2 + frame % 3) + [START]
                runs.append(len(ids))
                ids += [VIDEO] * rows + [END]
            ids += [END] * is_wrapped
            items.append(
                VisualItem(
                    modality="video",
                    digest="",
                    num_bytes=0,
                    grid=(frames, 2 * part[1], 2 * part[2]),
                    num_rows=frames * rows,
                    offset=runs[0],
                    param="",
                    run_offsets=tuple(runs),
                )
            )
            continue
        grid = (1, 2 * part[0], 2 * part[1])
        rows = part[0] * part[1]
        ids.append(START)
        items.append(
            VisualItem(modality="image", digest="", num_bytes=0, grid=grid, num_rows=rows, offset=len(ids), param="")
        )
        ids += [IMAGE] * rows + [END]
    return ids, items


def reference(ids: list[int], items: list[VisualItem]) -> tuple[torch.Tensor, int]:
    from types import SimpleNamespace

    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

    config = SimpleNamespace(
        vision_config=SimpleNamespace(spatial_merge_size=2),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
    )
    model = Qwen3VLMoeModel.__new__(Qwen3VLMoeModel)
    torch.nn.Module.__init__(model)
    model.config = config
    tokens = torch.tensor([ids])
    grids = {kind: [item.grid for item in items if item.modality == kind] for kind in ("image", "video")}
    types = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    given = {f"{kind}_grid_thw": torch.tensor(found) for kind, found in grids.items() if found}
    positions, delta = model.get_rope_index(tokens, mm_token_type_ids=types, **given)
    return positions[:, 0], int(delta)


def test_the_worked_example():
    ids, items = lay_out([3, (2, 3), 1])
    positions, delta = mrope_positions(len(ids), items, 2)
    assert positions[:, 4:10].tolist() == [[4] * 6, [4, 4, 4, 5, 5, 5], [4, 5, 6, 4, 5, 6]]
    assert positions[:, 10].tolist() == [7, 7, 7]
    assert delta == 9 - len(ids)


_SIDE = st.integers(1, 5)
_PARTS = st.one_of(st.integers(1, 9), st.tuples(_SIDE, _SIDE), st.tuples(st.integers(1, 4), _SIDE, _SIDE))


@given(st.lists(_PARTS, min_size=1, max_size=6), st.booleans())
def test_positions_equal_the_reference(parts, is_wrapped):
    ids, items = lay_out(parts, is_wrapped=is_wrapped)
    positions, delta = mrope_positions(len(ids), items, 2)
    expected, expected_delta = reference(ids, items)
    assert torch.equal(positions, expected)
    assert delta == expected_delta


def test_item_positions_are_the_prompts_less_its_offset():
    ids, items = lay_out([5, (3, 2), 2])
    positions, _ = mrope_positions(len(ids), items, 2)
    where = slice(items[0].offset, items[0].offset + 6)
    assert torch.equal(item_positions(items[0].grid, 2).long() + 6, positions[:, where])
    assert item_positions(items[0].grid, 2).dtype == torch.int32


def test_items_that_do_not_fit_are_refused():
    ids, [item] = lay_out([2, (2, 2)])
    with pytest.raises(ValueError, match="does not fit a prompt of 4 tokens"):
        mrope_positions(4, [item], 2)
    with pytest.raises(ValueError, match="does not fit"):
        mrope_positions(len(ids), [item, item], 2)
