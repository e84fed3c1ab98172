"""The served system with hardly any room for visual rows: resumes all the time, and the same answers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Server
from tests.system.test_serve import ask_all, check_equal

SAMPLING = SamplingParams(max_new_tokens=64, logprobs=1)
TWO_BLOCKS = ("--block-size", "4", "--blocks", "2")


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Asked]:
    count = 200 if os.environ.get("Q3VL_ACCEPTANCE") else 24
    return ask_scenes(tmp_path_factory.mktemp("scenes"), seed=4242, count=count)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def album(asked: list[Asked], first: int) -> list[dict[str, Any]]:
    """Five images and a question in one turn."""
    parts = [part for entry in asked[first : first + 5] for part in entry.content()[:1]]
    return [*parts, {"type": "text", "text": asked[first].question}]


SPLITS = [(2, 1), pytest.param(8, 2, marks=[pytest.mark.acceptance, pytest.mark.timeout(600)])]


@pytest.mark.parametrize(("world", "encode_ranks"), SPLITS)
def test_two_blocks_are_enough(world, encode_ranks, asked, llm):
    expected = llm.chat([entry.messages() for entry in asked], SAMPLING)
    with Server(world, "--encode-ranks", str(encode_ranks), *TWO_BLOCKS, "--deepstack-rows", "64") as server:
        answers = ask_all(server, asked)
        check_equal(answers, expected)
        resumes = [answer["timings"]["resumes"] for _, answer in answers]
        assert sum(count > 0 for count in resumes) > len(asked) / 2
        assert any(answer["timings"]["items"][0]["resumes"] >= 2 for _, answer in answers)
        check_competing_albums(server, asked, llm)
    assert "left over" not in server.output()


def check_competing_albums(server: Server, asked: list[Asked], llm: LLM) -> None:
    """Two requests of several images each want the same two blocks."""
    albums = [album(asked, first) for first in range(8)]
    expected = llm.chat([[{"role": "user", "content": content}] for content in albums], SAMPLING)
    with ThreadPoolExecutor(2) as pool:
        check_equal(list(pool.map(server.chat, albums)), expected)


@pytest.mark.slow
def test_deepstack_that_never_fits_its_pool_is_ranged(asked, llm):
    """The same bits, and not one byte more: each DeepStack row travels once, with its row."""
    some = asked[:12]
    expected = llm.chat([entry.messages() for entry in some], SAMPLING)
    with Server(2, *TWO_BLOCKS, "--deepstack-rows", "8") as server:
        answers = ask_all(server, some)
        check_equal(answers, expected)
        for _, answer in answers:
            for item in answer["timings"]["items"]:
                assert item["transfer_bytes"] == item["rows"] * (4 * 128 * 4 + 16) + 64
    assert "left over" not in server.output()
