"""Three expert layouts and two spellings of the config: the same model, bit for bit, and the oracle's logits."""

import itertools

import pytest
import torch

from qwen3vl_disagg.checkpoint import load_model, read_config, write_random_checkpoint
from tests.support.oracle import CONFIGS, load_oracle, make_case, relative_error, run_oracle, run_ours

FORMS = list(itertools.product(["hub", "v5", "per_expert"], ["hub", "v5"]))
PROMPTS = make_case(CONFIGS["mixed"], "two images")


def write(folder, *, layout, spelling, num_shards=2, config=CONFIGS["mixed"]):
    write_random_checkpoint(folder, config, seed=5, layout=layout, spelling=spelling, num_shards=num_shards)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("reference"), layout="v5", spelling="v5", num_shards=1)
    return run_ours(load_model(folder), PROMPTS).logits


@pytest.mark.parametrize(("layout", "spelling"), FORMS)
def test_every_form_gives_the_same_logits(tmp_path, reference, layout, spelling):
    folder = write(tmp_path, layout=layout, spelling=spelling)
    assert read_config(folder) == CONFIGS["mixed"]
    assert torch.equal(run_ours(load_model(folder), PROMPTS).logits, reference)


@pytest.mark.parametrize(("layout", "spelling"), [form for form in FORMS if form[0] != "per_expert"])
def test_the_oracle_reads_what_we_write(tmp_path, reference, layout, spelling):
    """All but the per-expert layout, which the oracle does not load for this model."""
    oracle = load_oracle(write(tmp_path, layout=layout, spelling=spelling))
    assert relative_error(reference, run_oracle(oracle, CONFIGS["mixed"], PROMPTS).logits) < 1e-5


@pytest.mark.parametrize("name", ["mixed", "dense"])
def test_we_read_what_the_oracle_saves(pool, tmp_path, name):
    pool.oracle(name).save_pretrained(tmp_path)
    assert read_config(tmp_path) == CONFIGS[name]
    prompts = make_case(CONFIGS[name], "two images")
    assert torch.equal(run_ours(load_model(tmp_path), prompts).logits, run_ours(pool.ours(name), prompts).logits)
