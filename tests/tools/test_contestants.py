"""Contestants that live in this environment, with weights from a folder and with weights made on the device."""

import pytest
import torch

from tools.bench_contestants.hf_transformers import Transformers
from tools.bench_contestants.this_project import ThisProject
from tools.bench_contestants.worker import Setup
from tools.bench_stats import decode_rate
from tools.checkpoints import RANDOM_PRESETS, write_checkpoint, write_random_checkpoint
from tools.make_checkpoint import write_small_tokenizer

CONFIG = RANDOM_PRESETS["tiny-random"]


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("contestant", [ThisProject, Transformers])
@pytest.mark.parametrize("is_random", [False, True])
def test_every_measurement_has_its_times(tmp_path, contestant, is_random):
    if is_random:
        write_checkpoint(tmp_path, CONFIG, {})
    else:
        write_random_checkpoint(tmp_path, CONFIG, seed=0)
    write_small_tokenizer(tmp_path, CONFIG)
    measured = contestant(Setup(folder=str(tmp_path), threads=1, is_random=is_random))
    assert measured.facts()["torch"]
    stamps = measured.decode([[1, 2, 3, 4], [5, 6, 7, 8]], 6)
    assert [len(times) for times in stamps] == [6, 6]
    assert all(times == sorted(times) for times in stamps)
    assert decode_rate(stamps) > 0
    assert measured.prefill([1, 2, 3]) > 0
    assert measured.vision((1, 4, 4), CONFIG.vision.patch_dim, 0) > 0
