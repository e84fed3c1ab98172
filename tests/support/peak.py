"""The most memory that tensors made by some code take at once, by their shapes: also of those on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Counting(TorchDispatchMode):
    """Storages that operators gave back and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in _pytree.tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in given | self._seen:
                self._seen.add(key)
                self.now += (size := x.untyped_storage().nbytes())
                self.most = max(self.most, self.now)
                weakref.finalize(x.untyped_storage(), self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """Of what `run` makes; not of what was there before."""
    with _Counting() as counting:
        run()
    return counting.most
