"""What a step's lists let each token see, and the same from page tables: for tests on either device."""

from __future__ import annotations

import torch

from qwen3vl_disagg.model import flex
from qwen3vl_disagg.model.paged import extend_sdpa


def slots_of(table: torch.Tensor, total: int, page_size: int) -> torch.Tensor:
    place = torch.arange(total, device=table.device)
    return table[place // page_size] * page_size + place % page_size


def seen_by_tables(new, contexts, tables, page_size, num_slots) -> torch.Tensor:
    """`[T, S]`: the slots that each new token attends to."""
    rows = []
    for b, (count, total) in enumerate(zip(new, contexts, strict=True)):
        for place in range(total - count, total):
            row = torch.zeros(num_slots, dtype=torch.bool)
            row[slots_of(tables[b], place + 1, page_size)] = True
            rows.append(row)
    return torch.stack(rows)


def seen_by_lists(kind: flex.FlexKind, lists: flex.FlexLists, num_slots: int) -> torch.Tensor:
    """`[T, S]`: full pages as they are, partial ones under the mask."""
    num_blocks, slot = len(lists.num_partial), torch.arange(num_slots)
    fields = (lists.num_partial, lists.partial, lists.offset, lists.starts)
    mask_mod = flex.block_mask(kind, num_slots, *fields).mask_mod
    block, row = torch.arange(num_blocks)[:, None, None], torch.arange(kind.rows)[:, None]
    allowed = mask_mod(block, torch.tensor(0), row, slot)

    def is_listed(pages, counts):
        listed = torch.zeros(num_blocks, num_slots, dtype=torch.bool)
        for b in range(num_blocks):
            chosen = pages[b, : counts[b]].tolist()
            assert len(set(chosen)) == len(chosen), "a page that is listed twice counts twice"
            for page in chosen:
                listed[b, page * kind.page_size : (page + 1) * kind.page_size] = True
        return listed[:, None]

    partial, full = is_listed(lists.partial, lists.num_partial), is_listed(lists.full, lists.num_full)
    assert not (partial & full).any(), "a page in both lists"
    seen = (partial & allowed) | full
    return seen.expand(-1, kind.rows, -1).flatten(0, 1)[lists.back]


def reference(q, k_pool, v_pool, new, contexts, tables, page_size) -> torch.Tensor:
    outs = []
    for b, (part, total) in enumerate(zip(q.split(new), contexts, strict=True)):
        outs.append(extend_sdpa(part, k_pool, v_pool, slots_of(tables[b], total, page_size)))
    return torch.cat(outs)


def random_step(draw, page_size: int, num_pages: int, *, decode: bool, most: int = 4):
    """New tokens, contexts and page tables; some sequences begin with pages of another."""
    from hypothesis import strategies as st

    num_sequences = draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    longest = min(num_pages * page_size, 60 + page_size)
    contexts = [draw(st.integers(1, longest)) for _ in range(num_sequences)]
    new = [1 if decode else draw(st.integers(1, total)) for total in contexts]
    # Entries behind the context are ignored, whatever they are.
    tables = torch.full((num_sequences, -(-longest // page_size)), 10**6)
    for b, total in enumerate(contexts):
        pages = torch.randperm(num_pages, generator=generator)
        count = -(-total // page_size)
        if b and draw(st.booleans()):
            shared = tables[b - 1][: draw(st.integers(0, -(-contexts[b - 1] // page_size)))]
            pages = torch.cat([shared, pages[~torch.isin(pages, shared)]])
        tables[b, :count] = pages[:count]
    return new, contexts, tables
