"""Vectors and scores against the reference: its model, its tokenizer, its image processor, the published prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import processors

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.core.pooling import Pooling, read_score, read_vector
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.engine import EngineOptions
from qwen3vl_disagg.processing.pooling import find_task
from qwen3vl_disagg.protocol.messages import Finished, Tokens
from tests.support.engine import make_engine, run
from tests.support.local import settled
from tests.support.oracle import CASES, CONFIGS, engine_requests, make_case, run_oracle
from tests.support.pooling import (
    EMBED,
    EMBED_DEFAULT,
    IMAGE,
    JUDGE,
    RERANK_DEFAULT,
    Reference,
    noise,
    write_pooler,
)

TOLERANCE = 1e-5
PICTURES = [noise(70, 40, 1), noise(33, 90, 2), noise(400, 300, 3)]
CHAT = [{"role": "user", "content": "?"}]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return write_pooler(tmp_path_factory.mktemp("embed") / "m", "embed")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return write_pooler(tmp_path_factory.mktemp("rerank") / "m", "rerank")


@pytest.fixture(scope="module")
def embed(embedder):
    return LLM(embedder, image_resize="pillow", engine_options=EngineOptions(max_running=4, kv_cache_gib=0.05))


@pytest.fixture(scope="module")
def rerank(reranker):
    return LLM(reranker, image_resize="pillow", engine_options=EngineOptions(max_running=4, kv_cache_gib=0.05))


@pytest.fixture(scope="module")
def embed_reference(embedder):
    return Reference(embedder)


@pytest.fixture(scope="module")
def rerank_reference(reranker):
    return Reference(reranker)


def check_vector(found, expected) -> None:
    assert float((torch.tensor(found) - expected).abs().max()) < TOLERANCE
    assert abs(float(np.linalg.norm(found)) - 1) < 1e-6


def check_nothing_left(llm: LLM) -> None:
    pool = llm.engine.scheduler.pool
    assert llm.engine.is_empty
    assert pool.num_free == pool.num_pages
    assert settled(llm)
    assert llm.transfer.receiver.buffers.allocator.is_idle


@pytest.mark.parametrize("name", ["moe", "dense", "odd"])
@pytest.mark.parametrize("budget", [1000, 7])
def test_hidden_states_of_the_engine(pool, name, budget):
    """Of prompts with images and clips, in chunks of any size, beside requests that are answered."""
    config, model = CONFIGS[name], pool.ours(name)
    prompts = {f"{case} {n}": p for case in CASES for n, p in enumerate(make_case(config, case))}
    head = pool.oracle(name).lm_head.weight.detach()
    wanted = {}
    for n, key in enumerate(prompts):
        pooling = [Pooling(), Pooling(dimensions=5), Pooling(tokens=(17, 4)), None][n % 4]
        wanted[key] = SamplingParams(max_new_tokens=1 if pooling else 3, ignore_eos=True, pooling=pooling)
    engine = make_engine(
        model.language_model, max_prefill_tokens=budget, chunk_tokens=budget, min_overlap_tokens=1, prefix_cache=False
    )
    for key, events in run(engine, engine_requests(model, prompts), wanted).items():
        [end], pooling = [event for event in events if isinstance(event, Finished)], wanted[key].pooling
        tokens = [event for event in events if isinstance(event, Tokens)]
        if pooling is None:
            assert len(tokens) == 3
            assert end.vector == b""
            continue
        assert not tokens
        state = last_state(pool.oracle(name), config, prompts[key])
        if pooling.tokens:
            expected = torch.sigmoid(state @ (head[17] - head[4]))
            assert abs(read_score(end.vector) - float(expected)) < TOLERANCE
        else:
            check_vector(
                read_vector(end.vector), torch.nn.functional.normalize(state[: pooling.dimensions or None], dim=0)
            )
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


def last_state(oracle, config, prompt) -> torch.Tensor:
    kept = []
    handle = oracle.lm_head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0, -1].detach()))
    run_oracle(oracle, config, [prompt])
    handle.remove()
    return kept[-1]


def test_vectors(embed, embed_reference):
    inputs = [
        "a red circle",
        {"text": "a red circle", "instruction": " Find it"},
        {"image": PICTURES[0]},
        {"image": [PICTURES[1], PICTURES[2]], "text": ["two", " pictures"]},
        {},
        [{"role": "user", "content": [{"type": "text", "text": "see "}, {"type": "image", "image": PICTURES[0]}]}],
        [{"role": "system", "content": "Be."}, {"role": "user", "content": "so"}],
        {"content": "yes<|im_end|>"},
    ]
    prompts = [
        (EMBED_DEFAULT, "a red circle", []),
        ("Find it.", "a red circle", []),
        (EMBED_DEFAULT, IMAGE, PICTURES[:1]),
        (EMBED_DEFAULT, f"{IMAGE}{IMAGE}two pictures", PICTURES[1:]),
        (EMBED_DEFAULT, "NULL", []),
        (EMBED_DEFAULT, f"see {IMAGE}", PICTURES[:1]),
        ("Be.", "so", []),
    ]
    found = embed.embed(inputs)
    for result, (instruction, content, images) in zip(found, prompts, strict=False):
        text = EMBED.format(instruction=instruction, content=content)
        check_vector(result.embedding, embed_reference.vector(text, images))
        assert result.usage.completion_tokens == 0
    check_nothing_left(embed)
    for one, together in zip(inputs, found, strict=True):
        [alone] = embed.embed([one])
        np.testing.assert_allclose(alone.embedding, together.embedding, atol=1e-6)
        assert alone.usage == together.usage
    [short] = embed.embed(["a red circle"], instruction="Why?", dimensions=6)
    assert len(short.embedding) == 6
    check_vector(
        short.embedding, embed_reference.vector(EMBED.format(instruction="Why?", content="a red circle"), dimensions=6)
    )


def test_scores(rerank, rerank_reference):
    query = {"text": "which?", "image": PICTURES[0]}
    documents = ["the first", {"image": PICTURES[1]}, {"text": "both", "image": PICTURES[0]}, "the first", {}]
    contents = [("the first", []), (IMAGE, [1]), (f"{IMAGE}both", [0]), ("the first", []), ("NULL", [])]
    for instruction in (None, "Find the answer"):
        found = rerank.score(query, documents, instruction=instruction)
        for result, (content, images) in zip(found, contents, strict=True):
            names = {"instruction": instruction or RERANK_DEFAULT, "query": f"{IMAGE}which?", "document": content}
            expected = rerank_reference.score(JUDGE.format(**names), [PICTURES[0], *(PICTURES[i] for i in images)])
            assert abs(result.score - expected) < TOLERANCE
        assert found[0].score == pytest.approx(found[3].score, abs=1e-6)
        assert len({round(result.score, 5) for result in found}) == 4
        assert all(result.timings.cached_tokens > 50 for result in found[1:]), "what all begin with is computed once"
    check_nothing_left(rerank)


def test_an_image_is_encoded_once_however_often_it_comes(rerank):
    picture = noise(64, 96, 9)
    found = rerank.score({"image": picture}, [{"text": f"document {n}", "image": picture} for n in range(9)])
    items = [item for result in found for item in result.timings.items]
    assert len({item.batch for item in items if item.encode}) == 1
    assert sum(item.encode > 0 for item in items) <= 2, "both of the first pair, encoded together"


def test_what_the_tokenizer_puts_behind_a_text_is_the_last_token(tmp_path):
    folder = write_pooler(tmp_path / "m", "embed")
    backend = json.loads((folder / "tokenizer.json").read_text())
    end = next(token["id"] for token in backend["added_tokens"] if token["content"] == "<|endoftext|>")
    template = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)])
    backend["post_processor"] = json.loads(template.__getstate__())
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    [found] = LLM(folder, engine_options=EngineOptions(kv_cache_gib=0.05)).embed(["hello"])
    check_vector(found.embedding, Reference(folder).vector(EMBED.format(instruction=EMBED_DEFAULT, content="hello")))


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (5, "inputs[1]"),
        ({"txt": "a"}, "inputs[1].txt"),
        ({"content": "a", "text": "b"}, "inputs[1].text"),
        ({"content": 5}, "inputs[1].content"),
        ({"image": "/no/such.png"}, "inputs[1].image"),
        ({"text": 5}, "inputs[1].text"),
        ({"text": "a", "instruction": 5}, "inputs[1].instruction"),
    ],
)
def test_bad_inputs_are_named(embed, bad, param):
    with pytest.raises(InputError) as caught:
        embed.embed(["good", bad, "good"])
    assert caught.value.param == param
    check_nothing_left(embed)


def test_what_a_model_is_not_for_is_refused(embed, rerank):
    for call in (lambda: embed.score("a", ["b"]), lambda: rerank.embed(["a"]), lambda: embed.chat([CHAT])):
        with pytest.raises(InputError, match="needs a model that") as caught:
            call()
        assert caught.value.code == "unsupported_task"
    with pytest.raises(InputError, match="from 1 to 64"):
        embed.embed(["a"], dimensions=65)


def test_which_checkpoint_is_for_what(tmp_path, embedder):
    assert find_task(embedder) == "embed"
    assert find_task(embedder, "generate") == "generate"
    hub = tmp_path / "models--Qwen--Qwen3-VL-Reranker-2B" / "snapshots" / "abc"
    for folder, task in ((tmp_path / "Qwen3-VL-Embedding-8B", "embed"), (hub, "rerank"), (tmp_path / "m", "generate")):
        folder.mkdir(parents=True)
        assert find_task(folder) == task
    (tmp_path / "m" / "modules.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        find_task(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no token 'yes'"):
        LLM(task="rerank")
