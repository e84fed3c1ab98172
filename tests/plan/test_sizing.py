"""The arithmetic behind `plan`, against sums worked by hand, counted modules, and the rooms that it describes."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import ModelOptions
from qwen3vl_disagg.model.vl import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.parallel.expert_placement import shard_rows
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.plan.dry_run import dry_run
from qwen3vl_disagg.plan.hardware import BUILT_IN, Units
from qwen3vl_disagg.plan.presets import PRESETS
from qwen3vl_disagg.plan.sizing import Workload, best, plan
from qwen3vl_disagg.plan.times import (
    Place,
    Rank,
    amounts,
    decode_terms,
    first_token_terms,
    image_terms,
    prefill_terms,
    step_terms,
    total_seconds,
)
from qwen3vl_disagg.protocol.layout import RowSizes
from tests.support.random_model import random_vision_model, small_config
from tools.checkpoints import RANDOM_PRESETS

B30 = PRESETS["30b-a3b"]
H200, CPU = BUILT_IN["h200"], BUILT_IN["cpu"]
MODEL = SizedModel(B30, itemsize=2)


# ---- memory ----


def test_30b_on_six_language_ranks():
    # 128 experts over 6 ranks: 22 on five, 18 on the last. One expert: 3 matrices of 2048 x 768, bfloat16.
    assert MODEL.num_experts_of(6) == [22, 22, 22, 22, 22, 18]
    expert = 3 * 2048 * 768 * 2
    assert MODEL.experts_bytes(22) == 48 * 22 * expert == 9_965_666_304
    # q and o of 32 heads, k and v of 4, each 128 wide; two norms of D and two of a head in each layer, one at the end.
    attention = 48 * 2048 * 128 * (32 + 4 + 4 + 32)
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    assert MODEL.replicated_bytes() == 2 * (2 * 151936 * 2048 + attention + 48 * 128 * 2048 + norms)
    memory = MODEL.language_memory(6, requests=6, tokens=1088 + 256, rows=1088)
    assert memory["experts"] == 9_965_666_304
    # Keys and values: 2 x 48 layers x 4 heads x 128 x 2 bytes a token; 1,344 tokens are 21 pages of 64.
    assert memory["keys and values"] == 6 * 21 * 64 * 98_304
    assert MODEL.language_memory(6, requests=1, tokens=65, rows=1)["keys and values"] == 128 * 98_304


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_weights_are_those_of_the_modules(name, quantize):
    """The module counts what it holds; the parts are arithmetic, and add up to it."""
    made = dry_run(ModelOptions(dtype="bfloat16", quantize=quantize), name, range(1), range(1, 8))
    model = SizedModel(PRESETS[name], itemsize=2, is_int8=quantize != "none")
    with torch.device("meta"):
        tower = Qwen3VLMoeForConditionalGeneration(PRESETS[name], language_model=False)
    assert made.ranks[0].num_bytes == 2 * sum(weight.numel() for weight in tower.parameters()) == model.tower_bytes()
    parts = model.tower_bytes() + model.replicated_bytes() + model.experts_bytes(PRESETS[name].text.num_experts)
    assert made.model_bytes == parts


@given(st.integers(1, 200), st.integers(1, 100))
def test_experts_are_spread_as_the_ranks_do_it(num_experts, num_ranks):
    config = replace(B30, text=replace(B30.text, num_experts=num_experts, num_experts_per_tok=1))
    counted = [len(shard_rows(num_experts, num_ranks, rank)) for rank in range(num_ranks)]
    assert SizedModel(config, 2).num_experts_of(num_ranks) == counted


# ---- what goes over wires ----


def test_rows_of_an_image():
    # 1,024 tokens: a main row and 3 DeepStack rows of 2,048 bfloat16, and 16 bytes of id and positions; 64 of aux.
    assert MODEL.item_bytes(1024) == 1024 * (4 * 2048 * 2 + 16) + 64 == 16_793_664
    for config, itemsize in ((B30, 2), (RANDOM_PRESETS["mid"], 4)):
        text, levels = config.text, config.num_deepstack_levels
        sizes = RowSizes.of(hidden_size=text.hidden_size, num_levels=levels, itemsize=itemsize)
        assert SizedModel(config, itemsize).item_bytes(77) == sizes.transfer_bytes(77, 77)


def test_rows_between_language_ranks():
    # In bfloat16: 2048 + 2 x 8 numbers there; back 2048 sums, in float32 on CUDA.
    assert MODEL.gather_bytes(6, 4) == 5 * 4 * (2064 * 2 + 2048 * 4)
    assert SizedModel(B30, 2, is_cuda=False).gather_bytes(6, 4) == 5 * 4 * (2064 * 2 + 2048 * 2)
    assert MODEL.gather_bytes(1, 4) == 0


@pytest.mark.parametrize(("num_experts", "chosen", "num_ranks"), [(12, 2, 5), (128, 8, 6), (8, 8, 3), (16, 1, 4)])
def test_ranks_that_a_token_is_sent_to(num_experts, chosen, num_ranks):
    config = replace(B30, text=replace(B30.text, num_experts=num_experts, num_experts_per_tok=chosen))
    model, source, tries = SizedModel(config, 2), random.Random(1), 20_000
    of_expert = [rank for rank, count in enumerate(model.num_experts_of(num_ranks)) for _ in range(count)]
    sent = 0
    for number in range(tries):  # tokens of all ranks in turn
        ranks = {of_expert[expert] for expert in source.sample(range(num_experts), chosen)}
        sent += len(ranks - {number % num_ranks})
    row = (2 * 2048 + 2 * chosen) * 2
    assert model.all_to_all_bytes(num_ranks, 10) == pytest.approx(10 * sent / tries * row, rel=0.03)


# ---- experts that a step touches ----


@pytest.mark.parametrize(("tokens", "num_experts"), [(1, 22), (6, 22), (40, 18), (0, 22), (5, 0)])
def test_touched_experts_against_a_simulation(tokens, num_experts):
    source, tries = random.Random(3), 4000
    seen = 0
    for _ in range(tries):
        chosen = {expert for _ in range(tokens) for expert in source.sample(range(128), 8)}
        seen += len(chosen & set(range(num_experts)))
    assert MODEL.touched_experts(num_experts, tokens) == pytest.approx(seen / tries, rel=0.05, abs=0.02)


def test_operations_of_a_step_by_hand():
    # 3 matrices of 2048 x 768, 8 of 128 experts for each of 10 tokens, 22 of them here, a multiply-add is 2.
    assert MODEL.experts_flop(22, 10) == 2 * 3 * 2048 * 768 * 48 * 10 * 8 * 22 / 128
    weights = 48 * 2048 * (128 * 72 + 128)
    assert MODEL.step_flop(3, 2, 700) == 2 * weights * 3 + 2 * 151936 * 2048 * 2 + 4 * 48 * 32 * 128 * 700


def test_operations_of_the_tower_are_those_counted():
    config = small_config()
    model, pixels = random_vision_model(config, seed=1), torch.zeros(6 * 8, config.vision.patch_dim)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.visual(pixels, [(1, 6, 8)])
    assert SizedModel(config, 4).tower_flop(6 * 8 // 4) == counter.get_total_flops()


# ---- times ----


def test_ranks_share_units():
    gpus, cores, many = Units(8, 8, 8), Units(2, 4, 1.25), Units(8, 2, 3)
    assert gpus.spread([1.0, 3.0]) == gpus.read([1.0, 3.0]) == 3  # each its own
    assert cores.spread([1.0, 1.0, 1.0, 1.0]) == 2  # two cores, four ranks
    assert cores.spread([5.0, 1.0, 0.0, 0.0]) == 5  # one rank uses one core
    assert cores.read([1.0, 1.0]) == 1.6  # two cores read a quarter more than one
    assert cores.read([5.0]) == 5
    assert (many.compute([4.0]), many.read([3.0])) == (1, 1)  # four cores for each rank, and memory for three
    assert many.read([3.0, 3.0]) == 2
    assert (gpus.are_shared, cores.are_shared, Units(2, 3, 2).are_shared) == (False, True, True)
    assert Units.of(CPU, 4) == Units(2, 4, 37 / 29)
    assert Units.of(H200, 4) == Units(4, 4, 4)


def test_a_decode_step_by_hand():
    place = Place(MODEL, H200, num_encode=2, num_language=6)
    found = amounts(decode_terms(place, concurrency=8, context=100))
    weights = MODEL.replicated_bytes() - 2 * 151936 * 2048  # all but the embedding, of which 2 rows are read
    experts = 48 * 22 * (1 - (1 - 1 / 16) ** 8) * 3 * 2048 * 768 * 2
    assert found["byte"] == pytest.approx(weights + 2 * 2048 * 2 + 2 * 100 * 98_304 + experts)
    assert (found["step"], found["layer"], found["request"]) == (1, 48, 2)
    assert (found["exchange"], found["hop"], found["host_hop"]) == (97, 96 * 5, 0)
    assert found["wire_byte"] == 48 * MODEL.gather_bytes(6, 2)


def test_idle_ranks_take_part_in_exchanges_only():
    machine = replace(CPU, num_units=2, memory_lanes=1.25)
    place = Place(SizedModel(B30, 2, is_cuda=False), machine, num_encode=1, num_language=4)
    found = amounts(decode_terms(place, concurrency=1, context=100))
    assert (found["step"], found["exchange"]) == (1, 97 * 2)  # one rank on a core of its own; four ranks on two cores
    experts = 4 * 48 * 32 / 16 * 3 * 2048 * 768 * 2 / 1.25  # those of all ranks, as fast as both cores read
    dense = MODEL.replicated_bytes() - 2 * 151936 * 2048 + 2048 * 2
    assert found["byte"] == pytest.approx(dense + 100 * 98_304 + experts)


def test_hosts_and_the_other_dispatch():
    place = Place(MODEL, H200, num_encode=8, num_language=24, dispatch="all_to_all")
    found = amounts(decode_terms(place, concurrency=24, context=10))
    assert place.num_hosts == 3
    assert (found["exchange"], found["hop"], found["host_hop"]) == (3 * 48 + 1, 144 * 21, 144 * 2)
    assert found["wire_byte"] == pytest.approx(48 * MODEL.all_to_all_bytes(24, 1))
    assert H200.costs("bfloat16", 3)["wire_byte"] == 1 / 400e9
    assert H200.costs("bfloat16", 1)["wire_byte"] == 1 / 450e9


def test_prefill_in_pieces():
    place = Place(MODEL, H200, num_encode=1, num_language=2)
    found = amounts(prefill_terms(place, 10_000))
    assert found["step"] == 3  # 4096, 4096, 1808
    pairs = 10_000 * 10_001 / 2
    dense = MODEL.step_flop(10_000, 3, pairs)
    assert found["flop"] == pytest.approx(dense + MODEL.experts_flop(64, 10_000))
    together = amounts(prefill_terms(place, 512, num_prompts=2))
    alone = amounts(prefill_terms(place, 512))
    assert together["wire_byte"] == alone["wire_byte"]  # all bring as many rows, tokens or not
    assert together["flop"] == pytest.approx(alone["flop"] + MODEL.experts_flop(64, 512))


def test_a_dense_model_has_no_exchanges():
    place = Place(SizedModel(PRESETS["8b"], 2), H200, num_encode=1, num_language=3)
    assert not {"exchange", "hop", "wire_byte"} & set(amounts(decode_terms(place, 3, 10)))
    assert place.model.language_memory(3, 1, 10, 10)["experts"] == 0


def test_images_spread_over_encode_ranks():
    place = Place(MODEL, H200, num_encode=2, num_language=6)
    found = amounts(image_terms(place, images=3, visual_tokens=100))
    assert (found["item"], found["link"], found["tower"], found["preprocess_row"]) == (3, 3, 2, 200)
    assert found["link_byte"] == 3 * MODEL.item_bytes(100)
    assert found["tower_flop"] == 2 * MODEL.tower_flop(100)
    assert "images" not in first_token_terms(place, 0, 100, 10)


# ---- plans ----


def test_all_splits_and_the_limits_of_each():
    load = Workload(images=2, visual_tokens=256, text_tokens=40, output_tokens=100, concurrency=12)
    splits = plan(B30, H200, load, 8)
    assert [split.name for split in splits] == ["1+7", "2+6", "3+5", "4+4", "5+3", "6+2", "7+1"]
    split = splits[1]
    place = Place(MODEL, H200, 2, 6)
    token_s = total_seconds(decode_terms(place, 12, 40 + 512 + 50), split.costs)
    assert split.token_s == pytest.approx(token_s)
    assert split.tokens_s == pytest.approx(12 / token_s)
    tower = MODEL.tower_flop(256) / 395e12
    assert split.encode_requests_s == pytest.approx(2 / (2 * max(256 * 5e-5 / 2, tower)))
    prefill = total_seconds(prefill_terms(place, 552, num_prompts=6, most=512), split.costs) / 6
    assert split.language_requests_s == pytest.approx(1 / (prefill + 100 * token_s / 12))
    assert split.requests_s == min(split.encode_requests_s, split.language_requests_s)
    assert split.loaded_token_s == pytest.approx(token_s / (1 - split.requests_s * prefill))
    assert split.gap_s == pytest.approx(token_s + total_seconds(prefill_terms(place, 512), split.costs))
    chunked = total_seconds(prefill_terms(place, 552, most=512), split.costs)
    others = total_seconds(decode_terms(place, 11, 602), split.costs)
    whole = total_seconds(split.first_token["prefill"], split.costs)
    assert split.loaded_first_token_s == pytest.approx(split.first_token_s - whole + chunked + 2 * others)
    assert best(splits, load).requests_s == max(one.requests_s for one in splits)


def test_a_rate_finds_its_number_of_requests():
    load = Workload(images=1, output_tokens=100, requests_s=4.0)
    splits = plan(B30, H200, load, 8)
    split = splits[1]
    stay = split.loaded_first_token_s + 100 * split.loaded_token_s
    assert split.running == math.ceil(4 * stay)  # Little's law
    assert not split.is_overloaded
    soonest = min(splits, key=lambda one: one.loaded_first_token_s + 100 * one.loaded_token_s)
    assert best(splits, load) is soonest
    most = plan(B30, H200, replace(load, requests_s=None, concurrency=6 * 32), 8)[1]
    assert split.requests_s == most.requests_s  # what it could take, not what arrives
    (split,) = [one for one in plan(B30, H200, replace(load, requests_s=1e4), 8) if one.encode == 2]
    assert split.is_overloaded
    assert split.running == 6 * 32


def test_what_does_not_fit_says_what_is_missing():
    big = PRESETS["235b-a22b"]
    splits = plan(big, H200, Workload(), 8)
    tight, ample = splits[-1], splits[0]
    assert tight.missing_bytes == pytest.approx(sum(tight.language_memory.values()) - 141e9)
    assert ample.missing_bytes == 0
    # Many encode ranks would take the most requests, but then the language ranks are too few to hold the experts.
    splits = plan(B30, replace(H200, memory_bytes=30e9, preprocess_row_s=1e-2), Workload(), 8)
    assert max(splits, key=lambda one: one.requests_s).missing_bytes > 0
    assert best(splits, Workload()).missing_bytes == 0
    # Cores share a machine's memory: what all ranks take together counts.
    shared = plan(B30, CPU, Workload(), 4)[0]
    total = sum(shared.encode_memory.values()) + 3 * sum(shared.language_memory.values())
    assert shared.missing_bytes == pytest.approx(total - 2 * 12e9)


def test_sides_that_share_cores_share_their_limit():
    (split,) = plan(RANDOM_PRESETS["mid"], CPU, Workload(visual_tokens=196, concurrency=2), 2)
    assert split.requests_s == min(split.encode_requests_s, split.language_requests_s)  # a core each
    split = plan(RANDOM_PRESETS["mid"], CPU, Workload(visual_tokens=196, concurrency=2), 3)[0]
    of_cores = 2 * split.encode_requests_s  # one encode rank; on both cores it would be two
    assert split.requests_s == pytest.approx(1 / (1 / of_cores + 1 / split.language_requests_s))


machines = st.builds(
    lambda units, share, hop: replace(H200, num_units=units, flop_share=share, hop_s=hop),
    st.sampled_from([None, 2, 8]),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1e-4),
)
loads = st.builds(
    Workload,
    images=st.integers(0, 4),
    visual_tokens=st.integers(1, 3000),
    text_tokens=st.integers(1, 3000),
    output_tokens=st.integers(1, 1000),
    concurrency=st.integers(1, 100),
)


@given(machines, loads, st.integers(2, 12))
def test_more_to_do_never_takes_less(machine, load, num_ranks):
    splits = plan(B30, machine, load, num_ranks)
    more = {
        "text_tokens": load.text_tokens + 500,
        "visual_tokens": load.visual_tokens + 300,
        "output_tokens": load.output_tokens + 100,
        "images": load.images + 1,
    }
    for name, value in more.items():
        for before, after in zip(splits, plan(B30, machine, replace(load, **{name: value}), num_ranks), strict=True):
            assert after.token_s >= before.token_s
            assert after.first_token_s >= before.first_token_s * (1 - 1e-9)
            assert after.requests_s <= before.requests_s * (1 + 1e-9)
            assert sum(after.language_memory.values()) >= sum(before.language_memory.values())
    for before, after in pairwise(splits):  # fewer language ranks hold more each
        assert after.language_memory["experts"] >= before.language_memory["experts"]


@given(loads, st.sampled_from(["bytes_s", "bfloat16_flop_s", "wire_bytes_s", "link_bytes_s"]), st.floats(1.1, 100))
def test_a_faster_machine_is_never_slower(load, name, times):
    faster = replace(H200, **{name: getattr(H200, name) * times})
    for before, after in zip(plan(B30, H200, load, 6), plan(B30, faster, load, 6), strict=True):
        assert after.token_s <= before.token_s
        assert after.first_token_s <= before.first_token_s
        assert after.requests_s >= before.requests_s * (1 - 1e-9)


# ---- what other rooms say ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workload(images=-1), "--images -1"),
        (lambda: Workload(output_tokens=0), "--output-tokens 0"),
        (lambda: Workload(requests_s=0.0), "--requests-s 0.0"),
        (lambda: plan(B30, H200, Workload(), 1), "1 ranks: must be 2"),
        (lambda: plan(B30, H200, Workload(), 8, dtype="int4"), "dtype int4"),
        (lambda: plan(B30, H200, Workload(text_tokens=300_000), 8), "more than the context of 262144"),
        (lambda: replace(H200, step_s=-1.0), "step_s is -1.0"),
        (lambda: replace(H200, bytes_s=math.nan), "bytes_s is nan"),
        (lambda: replace(H200, num_units=0), "num_units"),
        (lambda: replace(CPU, memory_lanes=0.5), "memory_lanes must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_rank_without_tokens_adds_nothing():
    place = Place(MODEL, H200, 1, 3)
    alone = amounts(step_terms(place, [Rank.decode(1, 10)]))
    assert amounts(step_terms(place, [Rank.decode(1, 10), Rank(), Rank()])) == alone
