"""Three expert layouts and two spellings of the config: the same model, bit for bit, and the oracle's logits."""

import itertools

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qwen3vl_disagg.checkpoint import load_model, read_config
from qwen3vl_disagg.checkpoint.convert import convert
from qwen3vl_disagg.checkpoint.fp8 import dequantize
from tests.support.float8 import make_float8, split
from tests.support.oracle import CONFIGS, load_oracle, make_case, relative_error, run_oracle, run_ours
from tools.checkpoints import write_random_checkpoint

FORMS = list(itertools.product(["hub", "v5", "per_expert"], ["hub", "v5"]))
PROMPTS = make_case(CONFIGS["mixed"], "two images")


def write(folder, *, layout, spelling="hub", num_shards=2, config=CONFIGS["mixed"]):
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


@pytest.mark.parametrize("layout", ["hub", "v5"])
def test_the_oracle_reads_what_is_converted(tmp_path, reference, layout):
    """Also from the layout that it does not load."""
    convert(write(tmp_path / "0", layout="per_expert"), tmp_path / "1", layout=layout, max_shard_bytes=500_000)
    oracle = load_oracle(tmp_path / "1")
    assert relative_error(reference, run_oracle(oracle, CONFIGS["mixed"], PROMPTS).logits) < 1e-5


@pytest.mark.parametrize("name", ["mixed", "dense"])
def test_float8_made_plain_for_the_oracle(tmp_path, name):
    """It does not load the experts' float8; of what that stands for it makes the logits that we make of float8."""
    folder = write(tmp_path / "0", layout="hub", config=CONFIGS[name], num_shards=1)
    prompts = make_case(CONFIGS[name], "two images")
    plain = run_ours(load_model(folder), prompts).logits
    make_float8(folder, (16, 24))
    ours = run_ours(load_model(folder), prompts).logits
    convert(folder, tmp_path / "1")
    assert torch.equal(run_ours(load_model(tmp_path / "1"), prompts).logits, ours)
    theirs = run_oracle(load_oracle(tmp_path / "1"), CONFIGS[name], prompts).logits
    assert relative_error(ours, theirs) < 1e-5
    assert 1e-3 < relative_error(ours, plain) < 0.2


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_float8_stands_for_what_the_oracle_makes_of_it(scale_dtype):
    """Its arithmetic, for blocks that are whole."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    q, scale, meant = split(weight, (16, 24), scale_dtype)
    theirs = Fp8Dequantize(None)._dequantize_one
    for dtype in (torch.float32, torch.bfloat16):
        ours = dequantize(q, scale, (16, 24), dtype, torch.device("cpu"))
        assert torch.equal(ours, theirs(q, scale, output_dtype=dtype))
        assert torch.equal(ours, meant.to(dtype))
