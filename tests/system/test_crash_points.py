"""Each crash point in real processes, killed, stopped, raised: every request ends right or typed, nothing is left."""

from __future__ import annotations

import os

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.faults import ACTIONS, POINTS
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.crash import content, make_model, picture, run_fault

QUICK = [
    ("mid-payload-sent", "kill"),
    pytest.param("payload-received", "stop", marks=pytest.mark.slow),
    pytest.param("blocks-full", "raise", marks=pytest.mark.slow),
]
ALL = [(point, action) for point in POINTS for action in ACTIONS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("crash") / "model")


@pytest.fixture(scope="module")
def expected(model) -> dict[int, list[int]]:
    llm = LLM(model)
    sampling = SamplingParams(max_new_tokens=4)
    return {n: llm.chat([[{"role": "user", "content": content(picture(n))}]], sampling)[0].token_ids for n in (1, 2, 3)}


@pytest.mark.parametrize(("point", "action"), QUICK)
def test_a_fault_ends_no_request_wrongly(model, expected, point, action):
    result = run_fault(model, point, action, expected)
    assert result.is_good, result


@pytest.mark.acceptance
@pytest.mark.skipif(not os.environ.get("Q3VL_ACCEPTANCE"), reason="set Q3VL_ACCEPTANCE to run the long ones")
@pytest.mark.parametrize(("point", "action"), ALL)
def test_every_crash_point(model, expected, point, action):
    result = run_fault(model, point, action, expected)
    print(
        f"{point}:{action}: {result.outcomes}, slowest {result.slowest_s:.1f} s, after {result.after!r}, "
        f"job ended {result.job_ended}"
    )
    assert result.is_good, result
