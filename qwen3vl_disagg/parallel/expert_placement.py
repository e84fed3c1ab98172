"""Which rank holds which rows of which parameter, as plain arithmetic and tables.

Experts are spread over the language ranks, because they are nearly all of the bytes; everything else is on each of
them. Attention is not split: a request's tokens stay on one rank, which then needs all of the few KV heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

Plan = Sequence[tuple[str, Placement]]
"""Patterns of parameter names, each with the placement of what it matches over the language ranks."""

LANGUAGE_PLAN: Plan = (
    (r"model\.embed_tokens\.weight", Replicate()),
    (r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight", Replicate()),
    (r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj\.weight", Replicate()),
    (r"model\.layers\.\d+\.self_attn\.(q|k)_norm\.weight", Replicate()),
    (r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj", Shard(0)),
    (r"model\.layers\.\d+\.mlp\.gate\.weight", Replicate()),
    (r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight", Replicate()),
    (r"model\.norm\.weight", Replicate()),
    (r"lm_head\.weight", Replicate()),
)


def shard_rows(size: int, num_ranks: int, rank: int) -> range:
    """The rows of a dim of `size` that `rank` holds under `Shard`: all ranks get as many, the last ones fewer or none.

    The rule of `torch.chunk`, which DTensor follows.

    >>> [shard_rows(12, 5, rank) for rank in range(5)]
    [range(0, 3), range(3, 6), range(6, 9), range(9, 12), range(12, 12)]
    """
    if size < 0 or not 0 <= rank < num_ranks:
        raise ValueError(f"no rows of {size} for rank {rank} of {num_ranks}")
    most = -(-size // num_ranks)
    return range(min(size, rank * most), min(size, (rank + 1) * most))


def held_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights in this process: of what is spread over ranks only the part that is here, what
    has two names once."""
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    return sum(tensor.numel() * tensor.itemsize for tensor in local)


def placements(names: Iterable[str], plan: Plan = LANGUAGE_PLAN) -> dict[str, Placement]:
    """The placement of each parameter. ValueError for one that no pattern of the plan, or more than one, knows."""
    found = {}
    for name in names:
        known = [placement for pattern, placement in plan if re.fullmatch(pattern, name)]
        if len(known) != 1:
            raise ValueError(f"parameter {name}: {len(known)} patterns of the plan know its placement, must be 1")
        found[name] = known[0]
    return found
