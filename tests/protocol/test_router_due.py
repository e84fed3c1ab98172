"""When the router says that first tokens are due."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qwen3vl_disagg.core.due import FIRST_COME, PATIENCE, Prices
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings
from qwen3vl_disagg.protocol.messages import Finished, Tokens
from qwen3vl_disagg.protocol.routing import TOKEN_ID_BYTES, Admit
from tests.support.routing import Script, admit

IMAGES = [f"image {number}" for number in range(8)]


def asked(name: str, *images: str, tokens: int = 10, target_s: float = 1.0, timeout_s: float = 600.0) -> Admit:
    event = admit(name, *images, num_tokens=tokens + 5, timeout_s=timeout_s)
    return replace(event, token_ids=bytes(TOKEN_ID_BYTES * tokens), target_s=target_s)


def due_s(script: Script, event: Admit) -> float:
    [sent] = script.do(event)
    return sent.message.due_s


def test_a_request_is_due_after_its_target_and_its_price():
    script, prices = Script(), Prices()
    assert due_s(script, asked("text")) == 1.0 + PATIENCE * prices.of(0, 10)
    large = due_s(script, asked("large", *IMAGES, tokens=138))
    assert large == 1.0 + PATIENCE * prices.of(8 * 16, 138)
    assert due_s(script, asked("large, too", *IMAGES, tokens=138)) == large, "of equal price, in order of arrival"
    assert due_s(script, asked("urgent", *IMAGES, tokens=138, target_s=0.1)) < large
    assert due_s(script, asked("short of time", *IMAGES, tokens=138, timeout_s=1.25)) == 1.25 / 2
    assert due_s(script, asked("off", *IMAGES, tokens=138, target_s=FIRST_COME)) == FIRST_COME


def test_a_first_token_that_is_told_again_is_learnt_once():
    script, prices = Script(encode=1, language=1), Prices()
    script.do(asked("told twice"))
    timings = RequestTimings(prefill=20.0)
    for _ in range(5):
        first = Tokens(request_id="told twice", index=0, token_ids=[1], timings=timings)
        script.language_says(script.languages[0], first)
    prices.learn(10, timings)
    assert due_s(script, asked("new")) == 1.0 + PATIENCE * prices.of(0, 10)


@pytest.mark.parametrize("is_scored", [False, True])
def test_prices_follow_from_what_first_tokens_took(is_scored):
    """A rank with 10 ms a token and 40 ms a row; a request for a vector has no token, and counts as well."""
    script = Script(encode=1, language=1)
    rank, items = script.languages[0], [ItemTimings(rows=16, encode=640.0, encode_rank=0, batch=3)]
    for number in range(300):
        name = str(number)
        script.do(asked(name, "image", tokens=26))
        timings = RequestTimings(prefill=260.0, items=items)
        if is_scored:
            end = Finished(request_id=name, finish_reason="stop", timings=timings, vector=b"\0\0\0\0")
            script.language_says(rank, end)
        else:
            script.language_says(rank, Tokens(request_id=name, index=0, token_ids=[1], timings=timings))
            script.language_says(rank, Tokens(request_id=name, index=1, token_ids=[1]))
            script.language_says(rank, Finished(request_id=name, finish_reason="stop", timings=timings))
    assert math.isclose(due_s(script, asked("new", "image", tokens=26)), 1.0 + PATIENCE * (0.26 + 0.64), rel_tol=1e-3)
