"""Fitting a machine's figures to measurements that are made up, so that the right answer is known."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.plan.fit import (
    FITTED,
    MeasuredDecode,
    MeasuredFirstToken,
    MeasuredSplit,
    Measurements,
    Row,
    compare,
    fit,
    least_squares,
    places,
    read_measurements,
)
from qwen3vl_disagg.plan.hardware import BUILT_IN, Hardware
from qwen3vl_disagg.plan.times import decode_terms, first_token_terms, total_seconds
from tools.checkpoints import RANDOM_PRESETS, config_to_dict

MID = RANDOM_PRESETS["mid"]
TRUE = replace(
    BUILT_IN["cpu"],
    num_units=2,
    layer_s=0.0,
    step_s=2e-3,
    request_s=4e-4,
    bytes_s=20e9,
    bytes_share=1.0,
    flop_share=0.6,
    tower_flop_share=0.4,
    tower_s=3e-3,
    exchange_s=9e-4,
    hop_s=3e-4,
    wire_bytes_s=1e9,
    http_s=6e-3,
    item_s=3e-3,
    link_s=2e-3,
    link_bytes_s=1.5e9,
    preprocess_row_s=6e-5,
)
SPLITS = ((1, 1), (1, 3), (2, 4), (2, 6))


def made_up(hardware: Hardware, noise: float = 0.0, seed: int = 0) -> Measurements:
    """What the bench would see on that machine, off by up to `noise` of each figure."""
    source = random.Random(seed)
    measured = Measurements(
        bench="splits",
        machine={"cpu": "made up", "date": "2026-11-21"},
        model="mid",
        config=config_to_dict(MID),
        dtype="bfloat16",
        is_int8=False,
        is_cuda=False,
        units=2,
        splits=[MeasuredSplit(encode=e, language=n, decode=[], first_token=[]) for e, n in SPLITS],
    )
    costs = hardware.costs("bfloat16")

    def seen(seconds: float) -> float:
        return seconds * 1e3 * source.uniform(1 - noise, 1 + noise)

    for split, place in zip(measured.splits, places(measured, MID, hardware).values(), strict=True):
        for count in sorted({1, 2, 4, split.language, 2 * split.language}):
            token_ms = seen(total_seconds(decode_terms(place, count, 30 + 24), costs))
            split.decode.append(
                MeasuredDecode(
                    concurrency=count,
                    prompt_tokens=30,
                    new_tokens=48,
                    token_ms=token_ms,
                    tokens_s=count / token_ms * 1e3,
                )
            )
        for images, rows, text in ((0, 0, 30), (0, 0, 200), (1, 49, 30), (1, 196, 30)):
            stages = first_token_terms(place, images, rows, text)
            of_cost = {term.cost: term.seconds(costs) for term in stages.get("images", [])}
            split.first_token.append(
                MeasuredFirstToken(
                    images=images,
                    visual_tokens=rows,
                    text_tokens=text,
                    ms=seen(sum(total_seconds(terms, costs) for terms in stages.values())),
                    preprocess_ms=seen(of_cost.get("preprocess_row", 0.0)),
                    encode_ms=seen(of_cost.get("tower_flop", 0.0) + of_cost.get("tower", 0.0)),
                    transfer_ms=seen(of_cost.get("link", 0.0) + of_cost.get("link_byte", 0.0)),
                )
            )
    return measured


def test_a_fit_finds_the_costs_that_made_the_times():
    hardware = fit(made_up(TRUE), MID, ["1+1", "1+3"])
    found, true = hardware.costs("bfloat16"), TRUE.costs("bfloat16")
    for cost in (*FITTED, "preprocess_row", "tower_flop", "tower", "link", "link_byte"):
        assert found[cost] == pytest.approx(true[cost], rel=1e-3, abs=1e-15), cost
    assert (hardware.num_units, hardware.layer_s) == (2, 0.0)
    assert hardware.name == "cpu, fitted on 1+1 and 1+3"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("noise", "fit_on", "others"),
    [(0.08, ["1+1", "2+6"], {"1+3": 5, "2+4": 4}), (0.04, ["1+1", "1+3"], {"2+4": 4})],
)
def test_it_predicts_splits_that_it_has_not_seen(noise, fit_on, others, seed):
    measured = made_up(TRUE, noise=noise, seed=seed)
    compared = compare(measured, MID, fit(measured, MID, fit_on), list(others))
    for name, concurrencies in others.items():
        mine = [one for one in compared if one.split == name]
        assert len(mine) == 2 * concurrencies + 4  # per token and tokens/s of each, 4 first tokens
        for one in mine:
            assert 0.75 < one.ratio < 1.33, one


def test_one_number_of_ranks_leaves_hops_in_their_proportion():
    # 33 exchanges of a step, 32 of them with 2 hops; on the built-in machine a hop is a third of an exchange.
    measured = made_up(replace(TRUE, exchange_s=5e-4, hop_s=4e-4))
    costs = fit(measured, MID, ["1+1", "1+3"]).costs("bfloat16")
    assert costs["hop"] == pytest.approx(costs["exchange"] / 3)
    assert 33 * costs["exchange"] + 64 * costs["hop"] == pytest.approx(33 * 5e-4 + 64 * 4e-4, rel=0.03)
    costs = fit(measured, MID, ["1+1", "1+3", "2+6"]).costs("bfloat16")
    assert (costs["exchange"], costs["hop"]) == (pytest.approx(5e-4, rel=1e-3), pytest.approx(4e-4, rel=1e-3))


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(3, 9))
def test_least_squares_is_the_best_of_all_that_are_not_negative(seed, columns, rows):
    source = np.random.default_rng(seed)
    matrix = source.uniform(0, 1, (rows, columns)) * source.integers(0, 2, (rows, columns))
    names = FITTED[:columns]
    data = [Row(dict(zip(names, row, strict=True)), float(source.uniform(0.1, 2))) for row in matrix]
    found = least_squares(data, names)
    assert min(found.values()) >= 0

    def error(costs: np.ndarray) -> float:
        sums = np.array([sum(row.amounts[n] * c for n, c in zip(names, costs, strict=True)) for row in data])
        return float(((sums / [row.seconds for row in data] - 1) ** 2).sum())

    best = np.array([found[name] for name in names])
    for _ in range(200):  # no step to anywhere near makes it better: the error is convex, so none does anywhere
        step = source.normal(0, 10.0 ** source.uniform(-4, 0), columns)
        assert error(best) <= error(np.maximum(0, best + step)) + 1e-5


def write(path, measured: Measurements):
    path.write_bytes(msgspec.json.encode(measured))
    return path


def test_a_file_survives_and_is_checked(tmp_path):
    measured = made_up(TRUE)
    again, config = read_measurements(write(tmp_path / "a.json", measured))
    assert (again, config) == (measured, MID)
    for change, message in (
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"units": 0}, "units is 0"),
        ({"config": {"architectures": ["Other"]}}, "'Other' is not one of"),
        ({"bench": "gaps"}, "bench"),
        ({"splits": [{"encode": 1}]}, "splits"),
        ({"splits": [{"encode": 1, "language": 0, "decode": [], "first_token": []}]}, "split 1\\+0"),
    ):
        raw = {**msgspec.to_builtins(measured), **change}
        (tmp_path / "b.json").write_bytes(msgspec.json.encode(raw))
        with pytest.raises(InputError, match=message):
            read_measurements(tmp_path / "b.json")
    with pytest.raises(InputError, match="No such file"):
        read_measurements(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("names", "message"), [(["1+1"], "at least two splits, got 1"), (["1+1", "9+9"], "no split 9.9 was measured")]
)
def test_splits_that_cannot_be_fitted_on(names, message):
    with pytest.raises(InputError, match=message):
        fit(made_up(TRUE), MID, names)
