"""Pages change nothing: prefill whole or in chunks and decode, over scattered pages, equal one causal pass."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.model import ForwardBatch, PagedBatch
from tests.support.random_model import random_language_model, small_config

CONFIG = small_config()
MODEL = random_language_model(CONFIG, seed=0)
NUM_PAGES = 64


def new_caches(page_size, dtype=torch.float32):
    """Pools full of NaN: whatever is read before it was written shows, also with a weight of 0."""
    shape = (NUM_PAGES * page_size, CONFIG.text.num_key_value_heads, CONFIG.text.head_dim)
    return [
        (torch.full(shape, math.nan, dtype=dtype), torch.full(shape, math.nan, dtype=dtype)) for _ in MODEL.model.layers
    ]


def inputs(length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (length,), generator=generator)
    positions = torch.randint(0, 30, (3, length), generator=generator)
    width = CONFIG.num_deepstack_levels * CONFIG.text.hidden_size
    return ids, positions, torch.randn(length, width, generator=generator)


def run_paged(sequences, cuts, page_size, seed, model=MODEL, pages_dtype=torch.float32):
    """Run each sequence in the steps that `cuts` gives; a step takes the next part of every sequence that has one."""
    generator = torch.Generator().manual_seed(seed)
    pages_each = -(-max(len(ids) for ids, _, _ in sequences) // page_size)
    tables = torch.randperm(NUM_PAGES, generator=generator)[: len(sequences) * pages_each].view(-1, pages_each)
    caches = new_caches(page_size, pages_dtype)
    logits = [[] for _ in sequences]
    for step in range(max(len(c) for c in cuts)):
        active = [b for b, c in enumerate(cuts) if step < len(c)]
        parts = [slice(*cuts[b][step]) for b in active]
        batch = PagedBatch(
            [part.stop - part.start for part in parts],
            [part.stop for part in parts],
            tables[active],
            page_size,
            caches,
            last_only=False,
        )
        chosen = [(sequences[b], part) for b, part in zip(active, parts, strict=True)]
        ids = torch.cat([sequence[0][part] for sequence, part in chosen])
        positions = torch.cat([sequence[1][:, part] for sequence, part in chosen], dim=1)
        deepstack = torch.cat([sequence[2][part] for sequence, part in chosen])
        out = model(ids, positions, batch, input_deepstack_embeds=deepstack.to(model.lm_head.weight.dtype))
        for b, rows in zip(active, out.split(batch.seq_lens), strict=True):
            logits[b].append(rows)
    return torch.cat([row for rows in logits for row in rows])


def reference(sequences):
    ids, deepstack = torch.cat([s[0] for s in sequences]), torch.cat([s[2] for s in sequences])
    positions = torch.cat([s[1] for s in sequences], dim=1)
    batch = ForwardBatch.for_prompt([len(s[0]) for s in sequences], last_only=False)
    return MODEL(ids, positions, batch, input_deepstack_embeds=deepstack)


def check(sequences, cuts, page_size=4, seed=0):
    actual, expected = run_paged(sequences, cuts, page_size, seed), reference(sequences)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def steps(length, *ends):
    """(start, stop) of each step: `steps(9, 4, 5)` -> (0, 4), (4, 5), (5, 9)."""
    bounds = [0, *ends, length]
    return list(pairwise(bounds))


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_prefill_in_one_go(page_size):
    lengths = [5, 1, 17]
    check([inputs(n, n) for n in lengths], [steps(n) for n in lengths], page_size)


def test_prefill_in_chunks_then_decode():
    check([inputs(11, 1)], [steps(11, 4, 7, 8, 9, 10)])


def test_decode_of_several_lengths():
    lengths = [9, 4, 14]
    check([inputs(n, n) for n in lengths], [steps(n, n - 3, n - 2, n - 1) for n in lengths])


def test_prefill_beside_decode():
    check([inputs(8, 1), inputs(10, 2)], [steps(8, 6, 7), steps(10, 3)])


@settings(max_examples=15)
@given(data=st.data())
def test_any_schedule(data):
    sequences, cuts = [], []
    for seed in range(data.draw(st.integers(1, 3))):
        length = data.draw(st.integers(1, 13))
        ends = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
        sequences.append(inputs(length, seed))
        cuts.append(steps(length, *ends))
    check(sequences, cuts, data.draw(st.sampled_from([1, 3, 8])), data.draw(st.integers(0, 99)))


def test_bfloat16_pages_give_the_bits_of_float32_ones():
    """The keys and values of a bfloat16 model are bfloat16, and what is made of them is computed in float32 (heads of a
    size that no kernel takes)."""
    model = random_language_model(CONFIG, seed=0).bfloat16()
    sequences, cuts = [inputs(n, n) for n in (9, 1, 17)], [steps(9, 4, 7), steps(1), steps(17, 15, 16)]
    narrow, wide = (run_paged(sequences, cuts, 4, 0, model, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert narrow.isfinite().all()
    assert torch.equal(narrow, wide)


def test_slots():
    """Page size 4, pages 7 and 2: token 5 lies in slot 9."""
    batch = PagedBatch([2], [6], torch.tensor([[7, 2]]), 4, [])
    assert batch.new_slots_T.tolist() == [8, 9]


def test_pages_of_others_are_not_touched():
    caches = new_caches(4)
    ids, positions, _ = inputs(6, 0)
    MODEL(ids, positions, PagedBatch([6], [6], torch.tensor([[7, 2]]), 4, caches))
    written = {slot for keys, _ in caches for slot in keys.isfinite().any(-1).any(-1).nonzero().flatten().tolist()}
    assert written == {28, 29, 30, 31, 8, 9}


@pytest.mark.parametrize("last_only", [True, False])
def test_which_logits(last_only):
    lengths = [3, 1, 4]
    parts = [inputs(n, n) for n in lengths]
    ids, positions = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], dim=1)
    full = MODEL(ids, positions, ForwardBatch.for_prompt(lengths, last_only=False))
    got = MODEL(ids, positions, ForwardBatch.for_prompt(lengths, last_only=last_only))
    torch.testing.assert_close(got, full[[2, 3, 7]] if last_only else full)


@pytest.mark.parametrize(("new", "context"), [([0], [1]), ([3], [2]), ([1, 1], [1])])
def test_impossible_paged_lengths(new, context):
    with pytest.raises(ValueError, match=r"do not fit contexts|argument 2 is shorter"):
        PagedBatch(new, context, torch.zeros(1, 1, dtype=torch.int64), 4, [])


@pytest.mark.parametrize("lengths", [[], [0], [2, -1]])
def test_impossible_prompt_lengths(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        ForwardBatch.for_prompt(lengths)


def test_lengths_that_do_not_fit_the_tokens():
    with pytest.raises(ValueError, match="do not fit together"):
        MODEL(torch.zeros(4, dtype=torch.int64), torch.zeros(3, 4), ForwardBatch.for_prompt([3]))
