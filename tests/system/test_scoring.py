"""Scores of texts over HTTP, as an evaluation harness asks for them, against the oracle's."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from tests.support.http import post_json
from tests.support.oracle import load_oracle
from tests.support.server import Server

CONTEXT = "There is a picture with a red circle above a blue square. " * 6
CHOICES = [" The circle is above.", " The square is above it.", " Nothing is there.", " 12"]


@pytest.mark.slow  # starts a server
def test_sums_of_log_probabilities():
    """Of each of several endings, twice: what the first round leaves in the caches changes nothing."""
    oracle = load_oracle(resolve_model_folder(None))
    with Server(2, "--chunk-tokens", "32") as server:
        asked = [post_json(f"{server.url}/tokenize", {"prompt": CONTEXT + end}).json["tokens"] for end in CHOICES]
        start = len(post_json(f"{server.url}/tokenize", {"prompt": CONTEXT}).json["tokens"])
        for _ in range(2):
            body = {"prompt": asked, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
            reply = post_json(f"{server.url}/v1/completions", body)
            assert reply.status == 200, reply.data
            for ids, choice in zip(asked, reply.json["choices"], strict=True):
                told = choice["logprobs"]
                with torch.no_grad():
                    theirs = oracle(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
                each = [float(theirs[t - 1, ids[t]]) for t in range(1, len(ids))]
                assert max(abs(a - b) for a, b in zip(told["token_logprobs"][1:-1], each, strict=True)) < 1e-4
                assert abs(sum(told["token_logprobs"][start:-1]) - sum(each[start - 1 :])) < 1e-4
                best = [
                    max(top.values()) == own
                    for top, own in zip(told["top_logprobs"][1:-1], told["token_logprobs"][1:-1], strict=True)
                ]
                greedy = [int(theirs[t - 1].argmax()) == ids[t] for t in range(1, len(ids))]
                assert best == greedy
