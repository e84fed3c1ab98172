"""The same image again, in a served system: from the cache, with the same bits, and encoded once when it is wanted by
several at once. Each request has another system turn, so that no keys and values of an earlier one can be used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Server

OFF = ("--embedding-cache-mib", "0", "--vision-batch-tokens", "0")


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Asked]:
    entries = ask_scenes(tmp_path_factory.mktemp("scenes"), seed=77, count=12)
    return [entry for entry in entries if len(entry.images) == 1][:2]


def ask(server: Server, entry: Asked, system: str) -> tuple[Any, dict[str, Any]]:
    """(token ids with their logprobs, timings of the one item)."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": entry.content()}]
    status, answer = server.chat(None, messages=messages)
    assert status == 200, answer
    choice = answer["choices"][0]
    [item] = answer["timings"]["items"]
    assert answer["timings"]["encode"] == item["encode"]
    return (choice["token_ids"], choice["logprobs"]["content"]), item


def test_an_image_that_was_there_before_is_not_encoded_again_and_its_answer_is_the_same(asked):
    systems = ["red", "blue", "green"]
    with Server(2, *OFF) as server:
        expected = [ask(server, asked[0], system) for system in systems]
    for _, item in expected:
        assert not item["cached"]
        assert min(item["encode"], item["preprocess"]) > 0
    with Server(2) as server:
        answers = [ask(server, asked[0], system) for system in systems]
        assert [item["cached"] for _, item in answers] == [False, True, True]
        assert all(item["encode"] == item["preprocess"] == 0 for _, item in answers[1:])
        assert [item["transfer_bytes"] for _, item in answers] == [item["transfer_bytes"] for _, item in expected]
        for (answer, _), (other, _) in zip(answers, expected, strict=True):
            assert answer == other, "not bit for bit"

        with ThreadPoolExecutor(4) as pool:  # another image, for all at once
            systems = ["circle", "square", "star", "nothing"]
            at_once = list(pool.map(lambda system: ask(server, asked[1], system)[1], systems))
        assert len({item["batch"] for item in at_once} - {0}) == 1
        assert all(item["cached"] == (item["batch"] == 0) for item in at_once)
