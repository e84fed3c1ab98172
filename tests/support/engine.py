"""Requests for an engine over a small random model, and a way to drive it."""

from __future__ import annotations

from dataclasses import replace

import torch

from qwen3vl_disagg.core.requests import ItemTimings, VisualItem
from qwen3vl_disagg.engine.engine import Engine, EngineOptions
from qwen3vl_disagg.protocol.messages import NeedItems, Tokens
from qwen3vl_disagg.transport.buffers import VisualRows
from tests.support.random_model import IMAGE_TOKEN


def make_engine(model, **options) -> Engine:
    defaults = {"max_running": 4, "max_prefill_tokens": 40, "page_size": 4, "kv_cache_gib": 0.01}
    return Engine(model, eos_ids=frozenset({1}), options=EngineOptions(**{**defaults, **options}))


def make_item(offset: int, grid=(1, 4, 6), name="image") -> VisualItem:
    rows = grid[1] * grid[2] // 4
    return VisualItem(
        modality="image", digest=name, num_bytes=1, grid=grid, num_rows=rows, offset=offset, param="messages[0]"
    )


def make_rows(model, item: VisualItem, seed: int) -> VisualRows:
    generator = torch.Generator().manual_seed(seed)
    hidden, levels = model.config.text.hidden_size, model.config.num_deepstack_levels
    main = torch.randn(item.num_rows, hidden, generator=generator)
    deepstack = torch.randn(item.num_rows, levels * hidden, generator=generator)
    return VisualRows(1, 0, item.num_rows, ((0, main),), ((0, deepstack),))


def without_deepstack(rows: VisualRows) -> VisualRows:
    return replace(rows, deepstack=tuple((start, piece * 0) for start, piece in rows.deepstack))


def make_requests(model, count: int):
    """name -> (token ids, items, rows): text, one image, two images, in turn."""
    requests = {}
    generator = torch.Generator().manual_seed(5)
    for i in range(count):
        length = 3 + int(torch.randint(0, 9, (1,), generator=generator))
        text = torch.randint(10, 60, (length,), generator=generator).tolist()
        items, ids = [], text[:2]
        for _ in range(i % 3):
            grid = (1, 4, 6) if len(items) == 0 else (1, 2, 8)
            items.append(make_item(len(ids), grid=grid, name=f"{i}-{len(items)}"))
            ids = ids + [IMAGE_TOKEN] * items[-1].num_rows + [7]
        ids = ids + text[2:]
        requests[f"r{i}"] = (ids, items, [make_rows(model, item, 10 * i + j) for j, item in enumerate(items)])
    return requests


def run(engine: Engine, requests, sampling) -> dict[str, list]:
    """Drive the engine to the end; each request's events."""
    events: dict[str, list] = {name: [] for name in requests}
    for name, (ids, items, _) in requests.items():
        engine.add(name, ids, items, sampling[name] if isinstance(sampling, dict) else sampling)
    for _ in range(500):
        if engine.is_empty:
            return events
        assert engine.has_work
        for event in engine.step():
            events[event.request_id].append(event)
            if isinstance(event, NeedItems):
                for index in event.items:
                    rows = requests[event.request_id][2][index]
                    engine.provide_rows(event.request_id, index, rows, ItemTimings())
    raise AssertionError("the engine does not come to an end")


def token_ids(events) -> list[int]:
    return [i for event in events if isinstance(event, Tokens) for i in event.token_ids]
