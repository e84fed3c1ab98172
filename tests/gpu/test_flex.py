"""FlexAttention on CUDA in bfloat16: the contract of the CPU tests, and an engine with a compiled decoder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.model import PagedBatch, flex
from qwen3vl_disagg.protocol.messages import Tokens
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.flex import random_step, reference
from tests.support.random_model import cuda_config, random_language_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")


def graphs() -> int:
    from torch._dynamo.utils import counters  # seconds of every worker that collects this file

    return counters["stats"]["unique_graphs"]


def cuda_model():
    return random_language_model(cuda_config(), seed=0).to(device=CUDA, dtype=torch.bfloat16)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 4, 128), (6, 2, 64)])
@pytest.mark.parametrize("decode", [True, False])
def test_against_sdpa(page_size, heads, kv_heads, size, decode):
    """Also a group of 3 query heads, for which there is no decode kernel. As many graphs as kinds of batches."""
    num_pages = 2048 // page_size
    generator = torch.Generator(CUDA).manual_seed(0)
    keys, values = (
        torch.randn(2048, kv_heads, size, generator=generator, device=CUDA, dtype=torch.bfloat16) for _ in "kv"
    )
    before, kinds = graphs(), set()

    @settings(max_examples=40)
    @given(data=st.data())
    def check(data):
        new, contexts, tables = random_step(data.draw, page_size, num_pages, decode=decode, most=9)
        kind = flex.flex_kind("cuda", page_size, num_sequences=len(new), is_decode=decode)
        kinds.add(kind)
        q = torch.randn(sum(new), heads, size, generator=generator, device=CUDA, dtype=torch.bfloat16)
        plan = flex.make_plan(kind, torch.tensor(new), torch.tensor(contexts), tables, len(keys), CUDA)
        actual = flex.flex_attend(q, keys, values, *flex.read_plan(plan.lists, plan.sizes))
        args = (q.double(), keys.double(), values.double(), new, contexts, tables.to(CUDA), page_size)
        torch.testing.assert_close(actual.double(), reference(*args), atol=2e-2, rtol=2e-2)

    with torch.inference_mode():
        check()
    assert graphs() - before == len(kinds)


@torch.inference_mode()
def test_paged_batch_takes_it_by_default():
    model, page_size = cuda_model(), 16
    text = model.config.text
    shape = (8 * page_size, text.num_key_value_heads, text.head_dim)
    caches = {
        impl: [tuple(torch.zeros(shape, device=CUDA, dtype=torch.bfloat16) for _ in "kv") for _ in model.model.layers]
        for impl in (None, "sdpa")
    }
    tables = torch.tensor([[5, 2, 7], [4, 3, 0]])
    for new, contexts in [([40, 1], [40, 1]), ([1, 20], [41, 21]), ([1, 1], [42, 22])]:
        ids = torch.arange(sum(new), device=CUDA) % 50
        logits = []
        for impl, pools in caches.items():
            batch = PagedBatch(new, contexts, tables, page_size, pools, impl=impl)
            assert batch.impl == (impl or "flex")
            logits.append(model(ids, ids.expand(3, -1), batch).float())
        torch.testing.assert_close(*logits, atol=0.1, rtol=0.1)


def test_engine():
    """Graphs as predicted and no more; the first tokens are as probable as with SDPA."""
    requests = make_requests(random_language_model(cuda_config(), seed=0), 7)
    sampling = SamplingParams(max_new_tokens=12, logprobs=2)
    options = {"page_size": 16, "prefix_cache": True}
    expected = run(make_engine(cuda_model(), attention="sdpa", **options), requests, sampling)
    torch._dynamo.reset()
    engine = make_engine(cuda_model(), compile=True, **options)
    made = engine.runner.compiled.counts
    assert engine.runner.impl == "flex"
    assert (made.graphs, made.breaks) == (len(engine.runner.compiled.kinds), 0)
    with torch.compiler.set_stance("fail_on_recompile"):
        answers = run(engine, requests, sampling)
    assert engine.runner.compiled.counts == made
    for name, events in answers.items():
        assert len(token_ids(events)) == len(token_ids(expected[name])) or 1 in token_ids(events)
        first, other = (next(e for e in some if isinstance(e, Tokens)) for some in (events, expected[name]))
        assert first.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=0.1)
    torch._dynamo.reset()
