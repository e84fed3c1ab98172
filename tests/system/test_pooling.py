"""Vectors and scores over HTTP, from an encode rank and a language rank, against the oracle's."""

from __future__ import annotations

import base64

import pytest
import torch

from tests.support.http import post_json
from tests.support.pooling import (
    EMBED,
    EMBED_DEFAULT,
    IMAGE,
    JUDGE,
    RERANK_DEFAULT,
    Reference,
    noise,
    png_of,
    write_pooler,
)
from tests.support.server import Server

PICTURES = [noise(70, 40, 1), noise(33, 90, 2)]
URIS = ["data:image/png;base64," + base64.b64encode(png_of(picture)).decode() for picture in PICTURES]
TOLERANCE = 1e-5


@pytest.mark.slow  # starts a server
def test_vectors(tmp_path):
    folder = write_pooler(tmp_path / "m", "embed")
    reference = Reference(folder)
    with Server(2, "--model", str(folder), "--image-resize", "pillow") as server:
        inputs = ["a text", {"image": URIS[0]}, {"image": URIS, "text": "both"}, {"image": URIS[0]}]
        reply = post_json(f"{server.url}/v1/embeddings", {"input": inputs})
        assert reply.status == 200, reply.data
        contents = [("a text", []), (IMAGE, [0]), (f"{IMAGE}{IMAGE}both", [0, 1]), (IMAGE, [0])]
        for entry, (content, images) in zip(reply.json["data"], contents, strict=True):
            text = EMBED.format(instruction=EMBED_DEFAULT, content=content)
            expected = reference.vector(text, [PICTURES[n] for n in images])
            assert float((torch.tensor(entry["embedding"]) - expected).abs().max()) < TOLERANCE
        assert server.chat("no?")[0] == 400


@pytest.mark.slow  # starts a server
@pytest.mark.parametrize("world", [1, 4])
def test_scores(tmp_path, world):
    folder = write_pooler(tmp_path / "m", "rerank")
    reference = Reference(folder)
    with Server(world, "--model", str(folder), "--image-resize", "pillow") as server:
        documents = ["a text", {"image": URIS[1]}, *(f"text {n}" for n in range(6))]
        body = {"query": {"image": URIS[0], "text": "q"}, "documents": documents}
        for _ in range(2):
            reply = post_json(f"{server.url}/v1/rerank", body)
            assert reply.status == 200, reply.data
            assert len(reply.json["results"]) == len(documents)
            for result in reply.json["results"]:
                document = documents[result["index"]]
                content, images = (document, []) if isinstance(document, str) else (IMAGE, [PICTURES[1]])
                text = JUDGE.format(instruction=RERANK_DEFAULT, query=f"{IMAGE}q", document=content)
                expected = reference.score(text, [PICTURES[0], *images])
                assert abs(result["relevance_score"] - expected) < TOLERANCE
