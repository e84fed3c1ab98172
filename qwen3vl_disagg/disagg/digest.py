"""A cheap digest of rows: wrong, missing, swapped or shifted rows change it. No defence against an attacker.

Each row's bytes are summed as int64 words; the sums are added up weighted by the row's position. Digests of runs of an
item's rows add up to the digest of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PRIME = 1_000_003
_MASK = (1 << 63) - 1


def rows_digest(rows: Tensor, start: int = 0) -> int:
    """Digest of contiguous rows `[R, ...]` that are rows `start ..` of an item; in 0 .. 2**63 - 1.

    Row bytes are read as the widest integer that fits them.
    """
    if rows.numel() == 0:
        return 0
    words = rows.detach().cpu().contiguous().view(len(rows), -1)
    row_bytes = words.shape[1] * words.itemsize
    kind = next(
        dtype
        for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1))
        if row_bytes % size == 0
    )
    sums_R = words.view(kind).sum(1, dtype=torch.int64)
    weights_R = torch.arange(start + 1, start + len(rows) + 1, dtype=torch.int64) * _PRIME
    return int((sums_R * weights_R).sum()) & _MASK


def add_digests(*digests: int) -> int:
    return sum(digests) & _MASK
