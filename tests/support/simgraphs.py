"""CUDA graphs of the simulated device: what a capture refuses, and a replay that computes anew.

A capture notes each piece of work with the memory it reads and writes, and leaves no result: what it made is garbage
afterwards, and what it wrote to is as before, as on a device, where nothing runs while it is captured. A replay does
the same work on the same memory. So an input that is not where it was at the capture has no effect.

Refused, as by CUDA: whatever the host would wait for, and copies from memory that can be paged out. Refused where CUDA
would go on with wrong numbers: memory of the capture that is held on to behind it, although a later capture of the pool
may use it; memory of elsewhere that is read by a replay after everybody else gave it back.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.support.simstreams import here

_CAPTURING = "CUDA error: operation not permitted when stream is capturing"
_PAGEABLE = "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned"


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))


def _spoil(x: Tensor) -> None:
    x.fill_(float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else 99)


def _grouped_mm(*args: Any, **kwargs: Any) -> Tensor:
    """Rows past the last group are whatever was in memory."""
    out = torch.ops.aten._grouped_mm.default(*args, **kwargs)
    out[int((kwargs.get("offs") if "offs" in kwargs else args[2])[-1]) :] = float("nan")
    return out


def mark_nothing(x: Tensor, dim: int) -> None:
    """In place of `torch._dynamo.mark_dynamic`. A mock would keep the tensors of its calls."""


class Capture:
    """The work of one graph."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self._held: Counter[int] = Counter()
        """By memory: how many tensors here are of it, besides those of everybody else."""
        self._one_of: dict[int, Tensor] = {}
        self._born: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def _hold(self, x: Any) -> Any:
        """The same memory by tensors of our own, so that others of it can be counted."""
        if isinstance(x, Tensor):
            made = x.detach()
            self._held[_key(x)] += 1
            self._one_of[_key(x)] = made
            return made
        if isinstance(x, (list, tuple)):
            return type(x)(map(self._hold, x))
        return {name: self._hold(y) for name, y in x.items()} if type(x) is dict else x

    def add(self, call: Callable[..., Any], args: Any, kwargs: Any, writes: Sequence[Tensor]) -> Any:
        with here():
            for x in writes:
                if _key(x) not in self._born and _key(x) not in self._before:
                    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                    self._before[_key(x)] = (whole, whole.clone())
                    self._held[_key(x)] += 1
            given = {_key(x) for x in _tensors([args, kwargs])}
        out = call(*args, **kwargs)
        with here():
            made = [x for x in _tensors(out) if _key(x) not in given]
            if made or writes:
                self._born |= {_key(x) for x in made}
                self.work.append((call, self._hold(args), self._hold(kwargs), self._hold(made)))
        return out

    def _others(self, key: int) -> int:
        x = self._one_of[key]
        return torch._C._storage_Use_Count(x.untyped_storage()._cdata) - _NOBODY - self._held[key]

    def touched(self) -> tuple[list[Tensor], list[Tensor]]:
        """All memory that is only read, and all that is written."""
        whole = {key: torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()) for key, x in self._one_of.items()}
        written = self._born | self._before.keys()
        return [x for key, x in whole.items() if key not in written], [whole[key] for key in written & whole.keys()]

    def end(self) -> str | None:
        """Forget the results. What was done wrong, if there is anything."""
        with here():
            if any(self._others(key) > 0 for key in self._born & self._one_of.keys()):
                gc.collect()
            kept = [self._one_of[key].shape for key in self._born & self._one_of.keys() if self._others(key) > 0]
            for *_, made in self.work:
                for x in made:
                    _spoil(x)
            for whole, before in self._before.values():
                whole.copy_(before)
        return f"memory of a graph's pool is held on to behind its capture: {[*map(tuple, kept)]}" if kept else None

    def run(self) -> str | None:
        with here():
            gone = [x.shape for key, x in self._one_of.items() if key not in self._born and self._others(key) < 1]
            for call, args, kwargs, made in self.work:
                fresh = (x for x in _tensors(call(*args, **kwargs)))
                for x, new in zip(made, fresh, strict=False) if made else ():
                    x.copy_(new)
        return f"a graph reads memory that was given back: {[*map(tuple, gone)]}" if gone else None


def _measured() -> int:
    """Counts of a tensor's memory that are not of tensors."""
    x = torch.zeros(3)
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata) - 1


_NOBODY = _measured()


class SimGraphs:
    """Of the simulated device of a `Watch`."""

    def __init__(self, watch: Any) -> None:
        self._watch, self._problem, self._here = watch, watch.problem, threading.local()
        self.num_replays, self.num_captures = 0, 0

    @property
    def _capture(self) -> Capture | None:
        return getattr(self._here, "capture", None)

    @property
    def is_capturing(self) -> bool:
        return self._capture is not None

    def refuse(self, kind: str, is_pageable: bool) -> None:
        """What a thread may not do while it captures."""
        if self._capture is not None:
            raise self._problem(f"{_PAGEABLE if is_pageable else _CAPTURING} ({kind})")

    def run(self, call: Callable[..., Any], *args: Any, writes: Sequence[Tensor] = (), **kwargs: Any) -> Any:
        """Work of the device, on tensors of the CPU; `writes`: those that it changes."""
        capture = self._capture
        return call(*args, **kwargs) if capture is None else capture.add(call, args, kwargs, writes)

    def operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The same of an operator of PyTorch, whose schema says what it writes."""
        work = _grouped_mm if func is torch.ops.aten._grouped_mm.default else func
        named = zip(func._schema.arguments, args, strict=False)
        writes = [x for argument, x in named if argument.alias_info is not None and argument.alias_info.is_write]
        return self.run(work, *args, writes=[*writes, *_tensors(kwargs.get("out"))], **kwargs)

    @contextlib.contextmanager
    def simulated(self) -> Iterator[None]:
        graphs, order = self, self._watch.order

        class CUDAGraph:
            work: Capture | None = None
            priority = 0

            def replay(self) -> None:
                graphs.refuse("replay", is_pageable=False)
                if self.work is None:
                    raise graphs._problem("a graph is replayed that was not captured")
                if order.priority_of(order.current) < self.priority:
                    raise graphs._problem(
                        "kernels of a graph have the priority of its capture's stream, not of this one"
                    )
                graphs.num_replays += 1
                with here():
                    order.step(*self.work.touched())
                if problem := self.work.run():
                    raise graphs._problem(problem)

        @contextlib.contextmanager
        def graph(made: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Any:
            graphs.refuse("capture", is_pageable=False)
            if capture_error_mode != "thread_local":
                raise graphs._problem("other threads may not use the device meanwhile")
            torch.cuda.synchronize()
            capture = graphs._here.capture = Capture()
            try:
                yield
            finally:
                graphs._here.capture = None
            if problem := capture.end():
                raise graphs._problem(problem)
            graphs.num_captures += 1
            made.work, made.priority = capture, 0 if stream is None else order.priority_of(stream.number)

        stands_in = {"CUDAGraph": CUDAGraph, "graph": graph, "graph_pool_handle": lambda: (0, 1)}
        with contextlib.ExitStack() as stack:
            for name, stand_in in stands_in.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
            yield
