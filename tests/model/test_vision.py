"""The tower by itself: images do not see one another, frames neither, and wrong shapes are refused."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qwen3vl_disagg.encode.worker import compile_tower
from qwen3vl_disagg.kernels import ops
from qwen3vl_disagg.model.kernels import use_kernels
from qwen3vl_disagg.model.vision import PositionEmbedding, VisionTower, patch_coordinates
from tests.support.oracle import CONFIGS

CONFIG = CONFIGS["moe"].vision
torch.manual_seed(0)
TOWER = VisionTower(CONFIG).eval().requires_grad_(False)


def pixels(*grids):
    return torch.rand(sum(t * h * w for t, h, w in grids), CONFIG.patch_dim) * 2 - 1


@settings(max_examples=10)
@given(
    grids=st.lists(
        st.tuples(st.integers(1, 2), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 10])), min_size=2, max_size=4
    )
)
def test_a_batch_equals_its_images_one_by_one(grids):
    x = pixels(*grids)
    main, levels = TOWER(x, grids)
    parts = [TOWER(part, [grid]) for part, grid in zip(x.split([t * h * w for t, h, w in grids]), grids, strict=True)]
    torch.testing.assert_close(main, torch.cat([part[0] for part in parts]), atol=1e-5, rtol=1e-4)
    for level, each in zip(levels, zip(*[part[1] for part in parts], strict=True), strict=True):
        torch.testing.assert_close(level, torch.cat(each), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not ops.is_cpu_bf16(torch.zeros(1, dtype=torch.bfloat16)), reason="no kernels here")
def test_with_the_kernels_a_tower_in_bfloat16_is_as_exact_as_without():
    torch.manual_seed(1)
    tower = VisionTower(replace(CONFIG, hidden_size=128, num_heads=2)).eval().requires_grad_(False)
    grids = [(1, 6, 10), (2, 4, 4)]
    x = pixels(*grids)
    rounded = tower.bfloat16()
    exact = deepcopy(rounded).double()(x, grids)[0]
    plain = (rounded(x, grids)[0] - exact).norm()
    assert use_kernels(rounded).blocks[0].attn.use_kernel
    assert (rounded(x, grids)[0] - exact).norm() < 1.2 * plain


def test_frames_of_a_video_do_not_see_one_another():
    x = pixels((1, 4, 6))
    still, _ = TOWER(x, [(1, 4, 6)])
    video, _ = TOWER(torch.cat([x, pixels((1, 4, 6)), x]), [(3, 4, 6)])
    torch.testing.assert_close(video[:6], still, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(video[12:], still, atol=1e-5, rtol=1e-4)


def test_a_patch_reaches_every_row_of_its_frame():
    x = pixels((1, 4, 4))
    before, _ = TOWER(x, [(1, 4, 4)])
    x[15] += 1
    after, _ = TOWER(x, [(1, 4, 4)])
    assert (before != after).any(dim=1).all()


def test_four_patches_make_one_row_and_the_tower_takes_grids_as_a_tensor_too():
    grids = [(1, 4, 6), (2, 2, 2)]
    x = pixels(*grids)
    main, levels = TOWER(x, torch.tensor(grids))
    assert main.shape == (8, CONFIG.out_hidden_size)
    assert [level.shape for level in levels] == [main.shape] * 3
    assert torch.equal(main, TOWER(x, grids)[0])


@settings(max_examples=25)
@given(side=st.integers(1, 9), height=st.integers(1, 12), width=st.integers(1, 12))
def test_position_table_is_read_as_bilinear_interpolation_with_aligned_corners(side, height, width):
    table = PositionEmbedding(side * side, 8)
    sizes = torch.tensor([height, width]).expand(height * width, 2)
    with torch.no_grad():
        actual = table(patch_coordinates([(1, height, width)], 1), sizes)
        image = table.weight.view(1, side, side, 8).permute(0, 3, 1, 2)
        expected = F.interpolate(image, (height, width), mode="bilinear", align_corners=True)
    torch.testing.assert_close(actual, expected[0].permute(1, 2, 0).flatten(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "grids", "message"),
    [
        ((15, 1536), [(1, 4, 4)], "16 patches"),
        ((16, 1535), [(1, 4, 4)], "16 patches"),
        ((12, 1536), [(1, 3, 4)], "multiples of 2"),
    ],
)
def test_pixels_that_do_not_fit_their_grids(shape, grids, message):
    with pytest.raises(ValueError, match=message):
        TOWER(torch.zeros(shape), grids)


def test_the_compiled_block_is_one_graph_for_all_sizes_and_gives_the_same_rows():
    torch.manual_seed(0)
    tower = VisionTower(CONFIG).eval().requires_grad_(False)
    sizes = [[(1, 4, 6)], [(1, 2, 2)], [(1, 8, 4), (2, 4, 4), (1, 2, 6)]]
    inputs = [(torch.randn(sum(t * h * w for t, h, w in grids), tower.config.patch_dim), grids) for grids in sizes]
    with torch.inference_mode():
        expected = [tower(*entry) for entry in inputs]
        torch._dynamo.reset()
        counts = compile_tower(tower)
        with torch.compiler.set_stance("fail_on_recompile"):
            actual = [tower(*entry) for entry in inputs]
    torch._dynamo.reset()
    assert (counts.graphs, counts.breaks) == (1, 0)
    for (main, levels), (expected_main, expected_levels) in zip(actual, expected, strict=True):
        for rows, expected_rows in zip([main, *levels], [expected_main, *expected_levels], strict=True):
            torch.testing.assert_close(rows, expected_rows, atol=1e-5, rtol=1e-5)
