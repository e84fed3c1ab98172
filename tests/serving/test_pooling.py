"""`/v1/embeddings`, `/v1/rerank`, `/v1/score` over a backend that gives vectors."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import math
import struct
import tracemalloc

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded
from qwen3vl_disagg.core.errors import InputError, OverloadedError
from qwen3vl_disagg.core.pooling import Pooling
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.processing import Processor, Prompt, media_plan
from qwen3vl_disagg.processing.pooling import MAX_PARTS as MAX_PARTS_OF_INPUT
from qwen3vl_disagg.processing.prompt_options import PromptOptions
from qwen3vl_disagg.serving import pooling, pooling_request
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.pooling import MAX_UNDER_WAY, SLICE
from qwen3vl_disagg.serving.pooling_request import MAX_INPUTS, MAX_PARTS, PoolingRequest, parse_pooling, pooled_prompts
from qwen3vl_disagg.serving.prepared import Prepared
from tests.support.asgi import Exchange
from tests.support.fake_backend import ASK, PATH, FakeBackend, serve, vector_steps
from tests.support.images import png, uri
from tests.support.pooling import EMBED, EMBED_DEFAULT, IMAGE, JUDGE, RERANK_DEFAULT, pooling_processor

PICTURE = png((64, 64))
IMAGE_PART = {"type": "image_url", "image_url": {"url": uri(PICTURE)}}
CHAT = [{"role": "user", "content": ["see ", IMAGE_PART]}]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return pooling_processor(tmp_path_factory.mktemp("embed") / "m", "embed")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return pooling_processor(tmp_path_factory.mktemp("rerank") / "m", "rerank")


def post(backend, processor, path, body, **options):
    reply = serve(backend, processor=processor, **options).post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def shown(processor: Processor, handle) -> str:
    """The prompt, with one placeholder for each image."""
    names = b"".join(map(processor.tokenizer.token_bytes, handle.prompt.token_ids)).decode()
    for item in handle.prompt.items:
        names = names.replace("<|image_pad|>" * item.num_rows, "<|image_pad|>", 1)
    return names


def embed_prompt(content: str, instruction: str = EMBED_DEFAULT) -> str:
    return EMBED.format(instruction=instruction, content=content)


@pytest.mark.parametrize(
    ("body", "prompts"),
    [
        ({"input": "a b"}, [embed_prompt("a b")]),
        ({"input": ["a", "b"], "user": "me"}, [embed_prompt("a"), embed_prompt("b")]),
        ({"input": "a", "instruction": "Find"}, [embed_prompt("a", "Find.")]),
        ({"input": [65, 66]}, None),
        ({"input": [[65, 66], [67]]}, None),
        ({"input": {"text": "a", "image": uri(PICTURE)}}, [embed_prompt(f"{IMAGE}a")]),
        ({"input": ["a", {"image": [uri(PICTURE)] * 2}]}, [embed_prompt("a"), embed_prompt(IMAGE + IMAGE)]),
        ({"input": [{"content": ["a", IMAGE_PART], "instruction": "So"}]}, [embed_prompt(f"a{IMAGE}", "So.")]),
        ({"input": {"content": []}}, [embed_prompt("NULL")]),
        ({"messages": CHAT}, [embed_prompt(f"see {IMAGE}")]),
        ({"messages": [{"role": "system", "content": "Be."}, *CHAT]}, [embed_prompt(f"see {IMAGE}", "Be.")]),
        (
            {"messages": [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]}
            | {"continue_final_message": True, "add_special_tokens": True},
            [embed_prompt(f"see {IMAGE}")],
        ),
    ],
)
def test_what_an_input_may_be(embedder, body, prompts):
    backend = FakeBackend()
    answer = post(backend, embedder, "/v1/embeddings", {"model": "tiny", **body})
    if prompts is None:
        ids = body["input"] if isinstance(body["input"][0], list) else [body["input"]]
        assert [handle.prompt.token_ids for handle in backend.handles] == ids
    else:
        assert [shown(embedder, handle) for handle in backend.handles] == prompts
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == list(range(len(backend.handles)))
    assert [entry["embedding"][0] for entry in answer["data"]] == list(range(len(backend.handles)))
    num_tokens = sum(len(handle.prompt.token_ids) for handle in backend.handles)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert all(handle.sampling.max_new_tokens == 1 for handle in backend.handles)
    assert all(handle.sampling.pooling == Pooling() for handle in backend.handles)


def test_numbers_and_base64(embedder):
    body = {"input": ["a", "b"], "dimensions": 5}
    floats = post(FakeBackend(), embedder, "/v1/embeddings", body)["data"]
    coded = post(FakeBackend(), embedder, "/v1/embeddings", {**body, "encoding_format": "base64"})["data"]
    for plain, other in zip(floats, coded, strict=True):
        assert list(struct.unpack("<5f", base64.b64decode(other["embedding"]))) == plain["embedding"]


def test_sizes_of_images(embedder):
    """Those of the published code where nothing is said."""
    large = {"input": {"image": uri(png((2000, 1500)))}}
    grids = []
    for more in ({}, {"mm_processor_kwargs": {"max_pixels": 4096}}):
        backend = FakeBackend()
        post(backend, embedder, "/v1/embeddings", {**large, **more})
        grids.append(math.prod(backend.handles[0].prompt.items[0].grid) * 256)
    assert 4096 < grids[0] <= 65536, "the checkpoint takes no more"
    assert grids[1] <= 4096


def rerank_prompt(query: str, document: str, instruction: str = RERANK_DEFAULT) -> str:
    return JUDGE.format(instruction=instruction, query=query, document=document)


def test_ranking(reranker):
    backend = FakeBackend()
    inner = backend.script

    def steps(prompt, sampling):
        assert not backend.handles or backend.handles[0].finished, "the first pair goes alone"
        return inner(prompt, sampling) if backend.handles else [0.05, *inner(prompt, sampling)]

    backend.script = steps
    documents = ["a", {"image": uri(PICTURE)}, {"text": "c", "image": uri(PICTURE)}]
    body = {"query": {"text": "q", "image": uri(PICTURE)}, "documents": documents, "top_n": 2, "instruction": "I"}
    answer = post(backend, reranker, "/v1/rerank", body)
    contents = ["a", IMAGE, f"{IMAGE}c"]
    assert [shown(reranker, handle) for handle in backend.handles] == [
        rerank_prompt(f"{IMAGE}q", content, "I") for content in contents
    ]
    assert [result["index"] for result in answer["results"]] == [2, 1], "best first, and no more than top_n"
    assert [result["document"] for result in answer["results"]] == [{"text": None}, {"text": None}]
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(1 / (1 + math.exp(-result["index"])))
    yes, no = (reranker.tokenizer.backend.token_to_id(word) for word in ("yes", "no"))
    assert all(handle.sampling.pooling == Pooling(tokens=(yes, no)) for handle in backend.handles)
    whole = post(FakeBackend(), reranker, "/v1/rerank", {"query": "q", "documents": ["a", "b"]})
    assert [result["document"]["text"] for result in whole["results"]] == ["b", "a"]
    bare = post(FakeBackend(), reranker, "/v1/rerank", {"query": "q", "documents": "a", "return_documents": False})
    assert "document" not in bare["results"][0]


@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        ({"text_1": "q", "text_2": "a"}, [("q", "a")]),
        ({"queries": "q", "documents": ["a", "b"]}, [("q", "a"), ("q", "b")]),
        ({"queries": ["q", "r"], "documents": ["a", "b"]}, [("q", "a"), ("r", "b")]),
        (
            {"data_1": "q", "data_2": {"content": [{"type": "text", "text": "a"}, IMAGE_PART]}},
            [("q", "a"), ("q", IMAGE)],
        ),
        ({"queries": {"text": "q"}, "items": [{"content": [IMAGE_PART, "x"]}]}, [("q", f"{IMAGE}x")]),
    ],
)
def test_scores(reranker, body, pairs):
    backend = FakeBackend()
    answer = post(backend, reranker, "/v1/score", body)
    assert [shown(reranker, handle) for handle in backend.handles] == [rerank_prompt(*pair) for pair in pairs]
    expected = [1 / (1 + math.exp(-n)) for n in range(len(pairs))]
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected)
    assert answer["data"][0]["object"] == "score"


GOOD = {"/v1/embeddings": {"input": "a"}, "/v1/rerank": {"query": "q", "documents": ["a"]}}
GOOD["/v1/score"] = {"queries": "q", "documents": ["a"]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": None}, "input"),
        ("/v1/embeddings", {"messages": CHAT}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ("/v1/embeddings", {"input": [[]]}, "input[0]"),
        ("/v1/embeddings", {"input": [[1], "a"]}, "input[1]"),
        ("/v1/embeddings", {"input": ["a", 5]}, "input[1]"),
        ("/v1/embeddings", {"input": [[10**6]]}, "input[0]"),
        ("/v1/embeddings", {"input": ["a", {"image": "data:image/png;base64,AAAA"}]}, "input[1].image"),
        ("/v1/embeddings", {"input": {"image": "http://a.example/b.png"}}, "input.image"),
        ("/v1/embeddings", {"input": {"picture": "a"}}, "input.picture"),
        ("/v1/embeddings", {"input": ["a", "a b " * 5000]}, "input[1]"),
        ("/v1/embeddings", {"dimensions": 65}, "dimensions"),
        ("/v1/embeddings", {"dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"normalize": False}, "normalize"),
        ("/v1/embeddings", {"temperature": 1}, "temperature"),
        ("/v1/embeddings", {"stream": True}, "stream"),
        ("/v1/embeddings", {"instruction": 5}, "instruction"),
        ("/v1/embeddings", {"input": None, "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ("/v1/rerank", {"query": None}, "query"),
        ("/v1/rerank", {"documents": []}, "documents"),
        ("/v1/rerank", {"documents": ["a", {"image": "x"}]}, "documents[1].image"),
        ("/v1/rerank", {"top_n": -1}, "top_n"),
        ("/v1/embeddings", {"input": {"text": 5}}, "input.text"),
        ("/v1/embeddings", {"input": {"text": ["a", 5]}}, "input.text"),
        ("/v1/embeddings", {"input": {"text": ["a"] * (MAX_PARTS_OF_INPUT + 1)}}, "input.text"),
        ("/v1/embeddings", {"input": [{"content": ["a"] * 1000}] * 66}, "input"),
        ("/v1/rerank", {"query": {"text": ["a"] * 1000}, "documents": [""] * 66}, "documents"),
        ("/v1/rerank", {"query": {"content": ["a", 5]}}, "query.content[1]"),
        ("/v1/rerank", {"query": {"content": ["a", {"type": "text", "text": 5}]}}, "query.content[1].text"),
        ("/v1/rerank", {"query": "\0"}, "query"),
        ("/v1/score", {"documents": {"content": ["a", 5]}}, "documents.content[1]"),
        ("/v1/score", {"documents": {"content": ["a", {"type": "image"}]}}, "documents.content[1]"),
        ("/v1/score", {"queries": ["a", "b", "c"], "documents": ["a", "b"]}, "queries"),
        ("/v1/score", {"text_1": "q"}, "text_1"),
    ],
)
def test_bad_requests(embedder, reranker, path, body, param):
    backend = FakeBackend()
    processor = embedder if path == "/v1/embeddings" else reranker
    reply = serve(backend, processor=processor).post(path, json={**GOOD[path], **body})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert not backend.handles


def test_parts_are_counted_before_pairs_are_made():
    body = {"query": {"text": ["a"] * 1000}, "documents": [""] * MAX_INPUTS}
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"a request may have {MAX_PARTS}"):
            parse_pooling(body, "rerank", model_names=[])
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("coding", ["float", "base64"])
def test_numbers_of_an_answer_are_bounded(embedder, monkeypatch, coding):
    monkeypatch.setattr(pooling_request, "MAX_NUMBERS" if coding == "float" else "MAX_BASE64_NUMBERS", 128)
    for count, status in ((2, 200), (3, 400)):
        body = {"input": ["a"] * count, "encoding_format": coding}
        assert serve(FakeBackend(), processor=embedder).post("/v1/embeddings", json=body).status_code == status


def test_what_a_model_is_not_for_is_refused(embedder, reranker):
    for processor, path, body in (
        (None, "/v1/embeddings", GOOD["/v1/embeddings"]),
        (None, "/v1/rerank", GOOD["/v1/rerank"]),
        (embedder, "/v1/score", GOOD["/v1/score"]),
        (reranker, "/v1/embeddings", GOOD["/v1/embeddings"]),
        (embedder, PATH, ASK),
        (reranker, "/v1/completions", {"prompt": "a"}),
    ):
        reply = serve(FakeBackend(), processor=processor).post(path, json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "unsupported_task")
        assert path in error["message"]
    assert serve(FakeBackend(), processor=embedder).post("/tokenize", json={"prompt": "a"}).status_code == 200
    full = FakeBackend()
    full.refused = OverloadedError("full")
    assert serve(full, processor=embedder).post("/v1/embeddings", json={"input": "a"}).status_code == 429


def test_equal_images_are_read_and_kept_once(reranker):
    request, inputs = parse_pooling(
        {"query": {"image": uri(PICTURE)}, "documents": [{"image": uri(PICTURE)}, "b", "c"]}, "rerank", model_names=[]
    )
    made = pooled_prompts(request, inputs, reranker, StopSignal())
    assert len({id(data) for prompt, _ in made for data in prompt.media}) == 1
    assert len({item.digest for prompt, _ in made for item in prompt.items}) == 1


def test_a_child_makes_the_same_prompts(reranker):
    """Many documents are no work for this process."""
    documents = [*(f"d{n}" for n in range(20)), {"image": uri(PICTURE)}]
    body = {"query": {"image": uri(PICTURE)}, "documents": documents}
    near, far = FakeBackend(), FakeBackend()
    alone = Processor.from_folder(reranker.folder, reranker.config)
    alone.folder = None  # no children
    answers = [post(near, alone, "/v1/rerank", body), post(far, reranker, "/v1/rerank", body)]
    assert answers[0]["results"] == answers[1]["results"]
    assert [handle.prompt for handle in near.handles] == [handle.prompt for handle in far.handles]


def test_keys_share_no_cache(reranker):
    salts = []
    for key in ("a", "b"):
        backend = FakeBackend()
        client = serve(backend, processor=reranker, keys=ApiKeys(["a", "b"]))
        body = {"query": {"image": uri(PICTURE)}, "documents": ["x", "y"]}
        assert client.post("/v1/rerank", json=body, headers={"authorization": f"Bearer {key}"}).status_code == 200
        own = {handle.sampling.cache_salt for handle in backend.handles}
        assert own == {item.salt for handle in backend.handles for item in handle.prompt.items}
        salts.append(own)
    assert all(len(own) == 1 for own in salts)
    assert salts[0] != salts[1]


def test_of_equal_sampling_one_is_salted(embedder):
    one = SamplingParams(max_new_tokens=1, pooling=Pooling())
    other = SamplingParams(max_new_tokens=2)
    prompts = [(Prompt([1], [], []), copy.copy(sampling)) for sampling in [*[one] * 50, other]]
    salted = Prepared(PoolingRequest(route="embeddings", prompt=PromptOptions()), prompts, 0.0).salted("key")
    made = [sampling for _, sampling in salted.prompts]
    assert len(set(map(id, made))) == 2
    assert [sampling.max_new_tokens for sampling in made] == [1] * 50 + [2]
    assert len({sampling.cache_salt for sampling in made}) == 1


def exchange(backend, processor, body, headers=None) -> Exchange:
    app = create_app(backend, processor, model_name="tiny")
    return Exchange(app, "/v1/embeddings", [json.dumps(body).encode()], headers)


def test_who_leaves_and_who_fails_ends_all_of_a_request(embedder):
    async def leave() -> None:
        backend = FakeBackend(lambda *_: [AllDecoded(), 60.0])
        asked = exchange(backend, embedder, {"input": ["a", "b", "c"]})
        running = asyncio.create_task(asked.run())
        async with asyncio.timeout(10):
            while len(backend.handles) < 3:
                await asyncio.sleep(0.01)
            asked.leave()
            await running
        assert all(handle.was_cancelled.is_set() for handle in backend.handles)

    async def fail() -> None:
        backend = FakeBackend(lambda prompt, _: [AllDecoded(), 60.0])
        second = [AllDecoded(), InputError("broken", param="input[1]")]
        backend.script = lambda *_: [*second] if len(backend.handles) == 1 else [AllDecoded(), 60.0]
        asked = exchange(backend, embedder, {"input": ["a", "b", "c"]})
        async with asyncio.timeout(10):
            await asked.run()
        assert (asked.status, asked.json["error"]["param"]) == (400, "input[1]")
        assert all(handle.was_cancelled.is_set() for handle in backend.handles)

    async def be_late() -> None:
        backend = FakeBackend(lambda *_: [60.0])
        asked = exchange(backend, embedder, {"input": "a"}, {"x-request-timeout-ms": "2000"})
        async with asyncio.timeout(10):
            await asked.run()
        assert asked.status == 504
        assert backend.handles[0].was_cancelled.is_set()

    for story in (leave, fail, be_late):
        asyncio.run(story())


class Crowded(FakeBackend):
    """Takes `most` prompts at a time, and refuses every second time when something was begun."""

    def __init__(self, most: int, script=None) -> None:
        super().__init__(script)
        self.most, self.asked = most, 0
        self.sizes: list[int] = []

    def submit(self, prompts, timeout_s):
        self.asked += 1
        if len(prompts) > self.most or self.asked % 2 == 0:
            for call in prompts:
                self.media.release(call.items)
            raise OverloadedError("full")
        self.sizes.append(len(prompts))
        return super().submit(prompts, timeout_s)


def test_many_prompts_go_in_slices(embedder, monkeypatch):
    monkeypatch.setattr(pooling, "RETRY_S", 0.01)
    backend = Crowded(SLICE)
    backend.script = lambda _, sampling: [0.01, *vector_steps(len(backend.handles), sampling.pooling)]
    answer = post(backend, embedder, "/v1/embeddings", {"input": ["a"] * 200})
    assert backend.sizes[:2] == [SLICE, SLICE // 2], "what is refused later is asked again, for less"
    assert [entry["embedding"][0] for entry in answer["data"]] == list(range(200))
    small = Crowded(SLICE - 1)
    reply = serve(small, processor=embedder).post("/v1/embeddings", json={"input": ["a"] * 200})
    assert (reply.status_code, small.asked) == (429, 1), "nothing was begun"


def test_what_waits_in_the_frontend_is_counted(embedder):
    """Of a request that has more prompts than go at once: its room is given back with the last of them."""

    async def main() -> None:
        backend = FakeBackend(lambda *_: [AllDecoded(), 60.0])
        app = create_app(backend, embedder, model_name="tiny", limits=Limits(max_body_memory=3000))

        def ask(count: int) -> Exchange:
            return Exchange(app, "/v1/embeddings", [json.dumps({"input": ["a"] * count}).encode()])

        for count, status in ((MAX_UNDER_WAY + 100, 429), (MAX_UNDER_WAY, None)):
            del backend.handles[:]
            first, second = ask(count), ask(400)
            running = [asyncio.create_task(first.run())]
            async with asyncio.timeout(60):
                while len(backend.handles) < MAX_UNDER_WAY:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)
                assert len(backend.handles) == MAX_UNDER_WAY
                running.append(asyncio.create_task(second.run()))
                while not second.sent and len(backend.handles) == MAX_UNDER_WAY:
                    await asyncio.sleep(0.01)
                assert (second.status if second.sent else None) == status
                first.leave()
                second.leave()
                await asyncio.gather(*running)
            assert all(handle.was_cancelled.is_set() for handle in backend.handles)

    asyncio.run(main())


def test_pixels_are_counted_once_for_each_size(reranker, monkeypatch):
    """As often as an encode rank decodes them."""
    monkeypatch.setattr(media_plan, "MAX_STILL_PIXELS", 2 * 64 * 64)

    def make(sides: list[int]) -> None:
        images = [{**IMAGE_PART, "resized_height": side, "resized_width": 64} for side in sides]
        documents = [{"content": [image]} for image in images]
        parsed = parse_pooling({"query": "q", "documents": documents}, "rerank", model_names=[])
        pooled_prompts(*parsed, reranker, StopSignal())

    make([32, 64, 32, 64])
    with pytest.raises(InputError, match="pixels to decode") as caught:
        make([32, 64, 96])
    assert caught.value.param == "documents[2].content[0]"
