"""How the kernels are called, and a step of such calls as a tape: recorded once, then run again and again by one team
of threads, without coming back to Python between them.

While a tape records, each kernel that is called is noted with its pointers and sizes, and so is what PyTorch does in
between where there is a kernel for it. Anything else that computes is refused. What is noted holds for as many rows as
were there, and for fewer: pointers stay, and how many rows there are is said anew in each run.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3vl_disagg.kernels.build import load

_aten = torch.ops.aten
_WORDS = 20
"""Of a call: its function and up to 19 arguments."""
_ROWS = {
    "rms_norm": 4,
    "add_rms_norm": 6,
    "norm_rotary": 7,
    "rotary": 7,
    "linear": 6,
    "linear_int8": 5,
    "swiglu": 5,
    "route": 3,
    "experts": 9,
    "experts_int8": 12,
    "decode_attention": 12,
    "add": 3,
    "embedding": 3,
}
"""The kernels that can be part of a step, and which of their arguments is the number of rows."""
_MAKES_ROOM = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default}
_VIEWS = {
    _aten.view.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.expand.default,
    _aten.split.sizes,
    _aten.split_with_sizes.default,
}
"""Other names for the same memory, where they do not copy it; none picks rows."""

_ONE_KERNEL = {"q3vl::linear", "q3vl::linear_int8", "q3vl::experts", "q3vl::experts_int8"}
"""Operators of this package that call a kernel, which is noted, and do nothing else where their tensors are whole."""

_here = threading.local()
"""`tape`: the one that records what this thread does."""


def _recording() -> Tape | None:
    return getattr(_here, "tape", None)


def library() -> ctypes.CDLL:
    found = load()
    if found is None:
        raise RuntimeError("the CPU kernels are not available here")
    return found


def call(name: str, *args: Tensor | ctypes.Array[Any] | float, reads: Sequence[Tensor] = ()) -> None:
    """Run a kernel by as many threads as torch has. Tensors and arrays are given as their addresses. `reads`: tensors
    whose addresses are in an array."""
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    getattr(library(), f"q3_{name}")(*plain, torch.get_num_threads())
    if (tape := _recording()) is not None:
        tape.note(name, *args, reads=reads)


def scratch(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """Room for a kernel's own use. On a tape all calls share what has one name and shape: one follows another."""
    tape = _recording()
    return torch.empty(shape, dtype=dtype) if tape is None else tape.scratch(name, shape, dtype)


def num_threads() -> int:
    """For how many a kernel needs scratch: while a tape records, for those that it may be run with."""
    tape, now = _recording(), torch.get_num_threads()
    return now if tape is None else max(tape.max_threads, now)


class NotRecordable(Exception):
    """A step does something that no kernel does; the message says what."""


class Tape:
    """The calls of a step for up to `max_rows` rows. Keeps alive what they read and write."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows, self.max_threads = max_rows, len(os.sched_getaffinity(0))
        self._words: list[int] = []
        self._kept: list[Any] = []
        self._scratch: dict[object, Tensor] = {}
        self._calls = torch.empty(0, dtype=torch.int64)

    @property
    def num_calls(self) -> int:
        return len(self._words) // _WORDS

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = (name, shape, dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(shape, dtype=dtype)
        return self._scratch[key]

    def note(self, name: str, *args: Tensor | ctypes.Array[Any] | float, reads: Sequence[Tensor] = ()) -> None:
        """A call that has just been made. NotRecordable if it cannot be part of a step."""
        place = _ROWS.get(name)
        if place is None or args[place] != self.max_rows:
            raise NotRecordable(f"kernel {name} with {[arg for arg in args if isinstance(arg, int)]}")
        function = ctypes.cast(getattr(library(), f"step_{name}"), ctypes.c_void_p).value
        words = [function or 0, *map(_word, args)]
        self._words += words + [0] * (_WORDS - len(words))
        self._kept += [*args, *reads]

    @contextmanager
    def record(self) -> Iterator[None]:
        """What is computed inside, by this thread, is noted. NotRecordable where that cannot be."""
        if _recording() is not None:
            raise RuntimeError("another tape is recording")
        _here.tape = self
        try:
            with _Refusing(self):
                yield
        finally:
            _here.tape = None
        self._calls = torch.tensor(self._words, dtype=torch.int64)

    def run(self, num_rows: int) -> None:
        """All calls, for the first `num_rows` rows."""
        if not 0 < num_rows <= self.max_rows:
            raise ValueError(f"a step of 1 to {self.max_rows} rows was recorded, not of {num_rows}")
        threads = min(torch.get_num_threads(), self.max_threads)
        library().q3_replay(self._calls.data_ptr(), len(self._calls) // _WORDS, num_rows, threads)


def _word(arg: Tensor | ctypes.Array[Any] | float) -> int:
    if isinstance(arg, Tensor):
        return arg.data_ptr()
    if isinstance(arg, ctypes.Array):
        return ctypes.addressof(arg)
    return struct.unpack("q", struct.pack("d", arg))[0] if isinstance(arg, float) else int(arg)


class _Refusing(TorchDispatchMode):
    """Lets operators pass that only name memory, notes those that are kernels of a step, refuses the others."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _MAKES_ROOM or (func in _VIEWS and _is_view(out, args, kwargs or {})):
            return out
        if func.name() in _ONE_KERNEL and all(arg.is_contiguous() for arg in args if isinstance(arg, Tensor)):
            return out
        note = _NOTED.get(func)
        if note is None:
            raise NotRecordable(f"{func} of {[tuple(a.shape) for a in args if isinstance(a, Tensor)]}")
        note(self.tape, out, *args, **(kwargs or {}))
        return out


def _is_view(out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    outs = out if isinstance(out, list | tuple) else [out]
    is_whole = len(outs) == 1 or kwargs.get("dim", (*args, 0)[2]) != 0
    return is_whole and all(one.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr() for one in outs)


def _note_add(tape: Tape, out: Tensor, *args: Tensor | float, **kwargs: float) -> None:
    terms = [arg for arg in args if isinstance(arg, Tensor)]
    fits = len(terms) == len(args) == 2 and not kwargs and out.dim() == 2 and out.shape[1] % 16 == 0
    for term in (*terms, out):
        fits = fits and term.shape == out.shape and term.is_contiguous() and term.dtype == torch.bfloat16
    if not fits:
        raise NotRecordable(f"aten.add of {[tuple(term.shape) for term in terms]}, {out.dtype}")
    a, b = terms
    tape.note("add", a, b, out, *out.shape)


def _note_embedding(tape: Tape, out: Tensor, weight: Tensor, ids: Tensor, *_: Any) -> None:
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous() or ids.dim() != 1:
        raise NotRecordable(f"aten.embedding of {tuple(ids.shape)}, {weight.dtype}")
    tape.note("embedding", weight, ids, out, *out.shape)


_NOTED: dict[Any, Callable[..., None]] = {
    _aten.add.Tensor: _note_add,
    _aten.embedding.default: _note_embedding,
}
