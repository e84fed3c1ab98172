"""FlexAttention over pages: lists against page tables, compiled against SDPA, and how often it is compiled."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.model import PagedBatch, flex
from tests.support.flex import random_step, reference, seen_by_lists, seen_by_tables
from tests.support.random_model import random_language_model, small_config

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 12


def graphs() -> int:
    from torch._dynamo.utils import counters  # seconds of every worker that collects this file

    return counters["stats"]["unique_graphs"]


def plan_of(kind, new, contexts, tables, num_slots):
    plan = flex.make_plan(kind, torch.tensor(new), torch.tensor(contexts), tables, num_slots, CPU)
    return flex.read_plan(plan.lists, plan.sizes)


def pools(num_slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_slots, KV_HEADS, SIZE, generator=generator) for _ in "kv"]


def queries(new, seed=1):
    return torch.randn(sum(new), HEADS, SIZE, generator=torch.Generator().manual_seed(seed))


# ---- lists, without a compiler ----


@given(data=st.data())
def test_lists_let_tokens_see_what_page_tables_say(data):
    """All kinds of both devices, pages of 1 to 128 tokens, shared pages."""
    page_size = data.draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 100, 128])))
    decode, device = data.draw(st.booleans()), data.draw(st.sampled_from(["cpu", "cuda"]))
    num_pages = data.draw(st.integers(1, 24))
    new, contexts, tables = random_step(data.draw, page_size, num_pages, decode=decode)
    num_slots = num_pages * page_size
    kind = flex.flex_kind(device, page_size, num_sequences=len(new), is_decode=decode)
    _, lists = plan_of(kind, new, contexts, tables, num_slots)
    expected = seen_by_tables(new, contexts, tables, page_size, num_slots)
    assert torch.equal(seen_by_lists(kind, lists, num_slots), expected)
    if kind.has_full:
        # What needs a mask is few pages; a list of all pages as partial ones would be right too, but slow.
        assert int(lists.num_partial.max()) <= kind.num_partial
    assert len(lists.num_partial) == kind.num_blocks or not kind.num_blocks


def test_worked_example():
    """That of `make_plan`: page size 4, 3 new tokens after 6, page table [7, 2, 5]."""
    kind = flex.flex_kind("cpu", 4, num_sequences=1, is_decode=False)
    _, lists = plan_of(kind, [3], [9], torch.tensor([[7, 2, 5]]), 40)
    assert lists.full[0, : lists.num_full[0]].tolist() == [7]
    assert lists.partial[0, : lists.num_partial[0]].tolist() == [2, 5]
    assert (lists.starts[0].tolist(), lists.offset[0].item()) == ([8, 20, -4], 2)
    assert lists.back.tolist() == [0, 1, 2]


def test_kinds_of_graphs():
    """On CUDA decode has one per power of two, on CPU one."""
    assert len(flex.flex_kinds("cpu", 16, 32)) == 2
    on_cuda = flex.flex_kinds("cuda", 16, 20)
    assert sorted(kind.num_blocks for kind in on_cuda) == [0, 1, 2, 4, 8, 16, 32]
    assert all(kind.has_full == (kind.rows > 1) for kind in on_cuda)


@pytest.mark.parametrize(
    ("device", "page_size", "head_dim", "runs"),
    [
        ("cpu", 1, 12, True),
        ("cuda", 16, 128, True),
        ("cuda", 8, 128, False),
        ("cuda", 48, 128, False),
        ("cuda", 128, 8, False),
    ],
)
def test_where_it_runs(device, page_size, head_dim, runs):
    assert (flex.why_not_flex(torch.device(device), page_size, head_dim) is None) == runs


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("new", [[1, 1], [5, 2]])
def test_uncompiled(new, monkeypatch):
    """The uncompiled form looks at the mask alone, so it gets one that knows the lists."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    contexts, tables, num_slots = [9, 6], torch.tensor([[3, 0, 5], [3, 4, 0]]), 24
    kind = flex.flex_kind("cpu", 4, num_sequences=2, is_decode=max(new) == 1)
    _, lists = plan_of(kind, new, contexts, tables, num_slots)
    seen = seen_by_lists(kind, lists, num_slots)
    q, (keys, values) = queries(new), pools(num_slots)
    mask = torch_flex.create_block_mask(lambda b, h, m, n: seen[m, n], None, None, len(q), num_slots, device="cpu")
    k, v = (pool.transpose(0, 1)[None] for pool in (keys, values))
    out = torch_flex.flex_attention(q.transpose(0, 1)[None], k, v, block_mask=mask, enable_gqa=True)
    expected = reference(q, keys, values, new, contexts, tables, 4)
    torch.testing.assert_close(out[0].transpose(0, 1), expected)


# ---- compiled ----


@pytest.mark.parametrize(("decode", "page_size"), [(True, 3), (True, 128), (False, 1), (False, 16)])
def test_compiled_against_sdpa(decode, page_size):
    """One graph for all lengths, batch sizes and page tables."""
    num_pages = max(4, 240 // page_size)
    num_slots = num_pages * page_size
    keys, values = pools(num_slots)
    before, seen = graphs(), set()

    @settings(max_examples=25)
    @given(data=st.data())
    def check(data):
        new, contexts, tables = random_step(data.draw, page_size, num_pages, decode=decode)
        kind = flex.flex_kind("cpu", page_size, num_sequences=len(new), is_decode=decode)
        q = queries(new, seed=data.draw(st.integers(0, 99)))
        seen.add(kind)
        actual = flex.flex_attend(q, keys, values, *plan_of(kind, new, contexts, tables, num_slots))
        expected = reference(q, keys, values, new, contexts, tables, page_size)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    with torch.inference_mode():
        check()
    assert (len(seen), graphs() - before) == (1, 1)


def test_compiled_for_a_fixed_number_of_blocks():
    """As decode on CUDA: three sequences in a graph for four."""
    kind, num_pages = flex.FlexKind("cpu", 16, 1, 4, True), 128
    keys, values = pools(num_pages * 16)
    before = graphs()
    with torch.inference_mode():
        for contexts in ([40, 1, 16], [17, 90, 33], [5], [64, 65, 66, 67]):
            new = [1] * len(contexts)
            tables = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))[:24].view(4, 6)
            q = queries(new)
            actual = flex.flex_attend(q, keys, values, *plan_of(kind, new, contexts, tables, len(keys)))
            expected = reference(q, keys, values, new, contexts, tables, 16)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert graphs() - before == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_graphs_of_cuda_do_not_depend_on_lengths(monkeypatch):
    """What the compiler's front end makes of the lists for CUDA; its back end, and so the result, is not run here."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_with(f, backend="eager", **options))
    flex.compiled_attention.cache_clear()
    keys, values = pools(256)
    before, kinds = graphs(), set()
    with torch.inference_mode():
        for new, contexts in [
            *[([1] * n, [30 + n] * n) for n in (1, 2, 3, 4)],
            *[([1] * n, [200 - n] * n) for n in (3, 2, 1)],
            *[([n], [n]) for n in (2, 20, 200)],
            *[([150, n], [170, 40]) for n in (1, 30)],
        ]:
            kind = flex.flex_kind("cuda", 16, num_sequences=len(new), is_decode=max(new) == 1)
            kinds.add(kind)
            tables = torch.arange(13).expand(len(new), -1)
            _, lists = plan_of(kind, new, contexts, tables, len(keys))
            flex.flex_attend(queries(new), keys, values, kind, lists)
    flex.compiled_attention.cache_clear()
    assert kinds == flex.flex_kinds("cuda", 16, 4)
    assert graphs() - before == len(kinds)


# ---- an eager model, pages that change owners ----


class Running:
    """A sequence in the loop below."""

    def __init__(self, ids, pool: PagePool) -> None:
        self.ids, self.pool = ids, pool
        prefix = pool.find([self.content(i) for i in range((len(ids) - 1) // pool.page_size)])
        found, self.node = prefix.pages, prefix.node
        pages = pool.allocate(pool.pages_for(len(ids) + 8) - len(found), found)
        self.pages = pages or []
        self.num_known = self.num_shared = len(found)
        self.cached = len(found) * pool.page_size

    def content(self, page: int) -> tuple[int, ...]:
        return tuple(self.ids[page * self.pool.page_size : (page + 1) * self.pool.page_size])

    def advance(self, total: int, rng: random.Random) -> None:
        """The first `total` tokens are in pages now."""
        self.cached = total
        if total == len(self.ids):
            self.ids.append(rng.randrange(50))
        while self.node is not None and self.num_known < total // self.pool.page_size:
            self.node = self.pool.remember(self.pages[self.num_known], self.node, self.content(self.num_known))
            self.num_known += 1


@pytest.mark.slow
@torch.inference_mode()
def test_bfloat16_pages_on_a_cpu_are_read_as_exactly_as_by_sdpa():
    config = small_config()
    model = random_language_model(config, seed=0).bfloat16()
    shape = (20, config.text.num_key_value_heads, config.text.head_dim)
    logits = {}
    for impl in ("flex", "sdpa"):
        caches = [tuple(torch.zeros(shape, dtype=torch.bfloat16) for _ in "kv") for _ in model.model.layers]
        batch = PagedBatch([17], [17], torch.arange(5)[None], 4, caches, impl=impl)
        logits[impl] = model(torch.arange(17), torch.arange(17).expand(3, -1), batch)
    torch.testing.assert_close(logits["flex"], logits["sdpa"], atol=0.02, rtol=0.02)


@torch.inference_mode()
def test_fifty_steps_over_pages_that_change_owners():
    """Prefill in chunks and decode, beginnings shared by the prefix cache, pages freed and taken by others."""
    page_size, rng = 4, random.Random(0)
    config = small_config()
    model = random_language_model(config, seed=0)
    pool = PagePool(24, page_size, keep=True)
    shape = (24 * page_size, config.text.num_key_value_heads, config.text.head_dim)
    # What is read before it was written shows.
    caches = {
        impl: [(torch.full(shape, math.nan), torch.full(shape, math.inf)) for _ in model.model.layers]
        for impl in ("flex", "sdpa")
    }
    stems = [[rng.randrange(50) for _ in range(12)] for _ in range(2)]
    running: list[Running] = []
    counts, owners, num_shared = [], {}, 0
    for step in range(50):
        if len(running) < 3:
            ids = rng.choice(stems)[: rng.randint(0, 12)] + [rng.randrange(50) for _ in range(rng.randint(1, 9))]
            new_one = Running(ids, pool)
            if new_one.pages:
                running.append(new_one)
                num_shared += new_one.num_shared
                for page in new_one.pages:
                    owners.setdefault(page, set()).add(step)
        chunks = [s for s in running if s.cached < len(s.ids) - 1]
        batch = chunks[: rng.randint(1, 3)] if chunks and rng.random() < 0.7 else list(running)
        new = [rng.randint(1, len(s.ids) - s.cached) for s in batch]
        contexts = [s.cached + n for s, n in zip(batch, new, strict=True)]
        width = max(len(s.pages) for s in batch)
        tables = torch.tensor([s.pages + [0] * (width - len(s.pages)) for s in batch])
        ids = torch.tensor([i for s, n in zip(batch, new, strict=True) for i in s.ids[s.cached : s.cached + n]])
        positions = torch.cat([torch.arange(c - n, c) for c, n in zip(contexts, new, strict=True)]).expand(3, -1)
        logits = {
            impl: model(ids, positions, PagedBatch(new, contexts, tables, page_size, caches[impl], impl=impl))
            for impl in caches
        }
        torch.testing.assert_close(logits["flex"], logits["sdpa"], atol=1e-4, rtol=1e-4)
        for s, total in zip(batch, contexts, strict=True):
            s.advance(total, rng)
            if total >= len(s.pages) * page_size - 1:
                pool.free(s.pages)
                running.remove(s)
        counts.append(graphs())
    assert any(len(steps) > 1 for steps in owners.values())
    assert num_shared > 0
    assert counts[-1] == counts[9], "compiled again after the first steps"
