"""A CUDA device that is not there, for tests of everything but its kernels.

`simulated()` makes tensors that say `cuda:0` and compute on the CPU, and a `Watch` that knows what a real device would
have had to say: tensors of two devices in one operator, operators without a CUDA kernel, operands that `grouped_mm`
does not take, and each time the host would have waited. What runs in it is the real code with real numbers: host
logic, devices and copies are shown by it; kernels, speed, streams and memory are not.

Compiled regions run uncompiled, and are told that they are compiled. FlexAttention is computed from its block lists.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3vl_disagg.model import flex, moe, paged, quantized, vision
from tests.support.simgraphs import SimGraphs, mark_nothing

DEVICE = torch.device("cuda", 0)
H2D, STAGED, ASYNC, D2H, ITEM, SHAPE = "H2D blocking", "H2D staged", "H2D pinned", "D2H", "item", "shape"
"""Blocking: from memory that can be paged out. Staged: the same, but not waited for, which the driver does not promise.
Item: one number, as `bool` and `.item()` take it. Shape: an operator whose result's shape the host has to learn."""
WAITS = (H2D, STAGED, D2H, ITEM, SHAPE)
_SHAPES = {"nonzero", "unique2", "_unique2", "unique_dim", "unique_consecutive", "masked_select"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_OPERATORS: dict[str, Callable[..., Any]] = {
    "paged_attention": paged._paged_attention,
    "attend_frames": vision._attend_frames_opaque,
    "experts_ungrouped": moe.run_experts_ungrouped,
    "experts_dequantized": quantized.run_experts_dequantized,
    "flex_attention": flex._flex_attention,
}
"""Those of the package's own operators that run on any device, by what they run."""


class Watch:
    """What was seen: `counts` of copies and waits by kind and place, `problems` that a device would have raised, and
    the `sdpa` backends that were allowed when attention was computed (flash, efficient, math, cuDNN)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.graphs = SimGraphs(self.problem)
        self.reset()

    def reset(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.sdpa: set[tuple[bool, bool, bool, bool]] = set()

    def count(self, kind: str) -> None:
        if kind in WAITS:
            self.graphs.refuse(kind, is_pageable=kind == STAGED)
        with self._lock:
            self.counts[kind, _place()] += 1

    def problem(self, message: str) -> RuntimeError:
        with self._lock:
            self.problems.append(f"{message}, at {_place()}")
        return RuntimeError(message)

    def of(self, *kinds: str) -> int:
        return sum(number for (kind, _), number in self.counts.items() if kind in kinds)

    def __str__(self) -> str:
        rows = sorted(self.counts.items(), key=lambda row: (row[0][0], -row[1]))
        return "\n".join([f"{number:4d} x {kind:13s} {place}" for (kind, place), number in rows] + self.problems)


class SimTensor(Tensor):
    """Says `cuda:0`; its numbers are `elem`'s, on the CPU."""

    elem: Tensor
    watch: Watch

    @staticmethod
    def __new__(cls, elem: Tensor, watch: Watch) -> SimTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=DEVICE,
        )
        made.elem, made.watch = elem, watch
        return made

    def __repr__(self, **_: Any) -> str:
        return f"SimTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch = next(x.watch for x in _tensors(args, kwargs or {}) if isinstance(x, SimTensor))
        return _run(watch, func, args, kwargs or {})


# ---- what Python does with tensors, ahead of any operator ----


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func`, or what stands for it where a tensor of the device is among the arguments."""
    stand_in = _METHODS.get(func)
    if stand_in is not None:
        sim = next((x for x in _tensors(args, kwargs) if isinstance(x, SimTensor)), None)
        if sim is not None:
            return stand_in(sim.watch, *args, **kwargs)
    return func(*args, **kwargs)


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """Of an operator's arguments, which are no deeper than lists."""
    found: list[Tensor] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


def _elems(x: Any) -> Any:
    """`_elem` of what is in lists and tuples, too."""
    return type(x)(map(_elems, x)) if type(x) in (list, tuple) else _elem(x)


def _elem(x: Any) -> Any:
    return x.elem if isinstance(x, SimTensor) else x


def _wrapped(watch: Watch, x: Any) -> Any:
    if type(x) in (list, tuple):
        return type(x)(_wrapped(watch, y) for y in x)
    return SimTensor(x, watch) if isinstance(x, Tensor) and not isinstance(x, SimTensor) else x


def _index(watch: Watch, index: Any) -> Any:
    """What a device would have needed for it, and the same for the CPU."""
    for part in index if isinstance(index, tuple) else (index,):
        is_bool = isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
        if isinstance(part, SimTensor) and part.dim() == 0 and not is_bool:
            watch.count(ITEM)
        elif is_bool:
            watch.count(SHAPE)
        elif isinstance(part, (list, Tensor)) and not isinstance(part, SimTensor):
            watch.count(H2D)
    return _elems(index)


def _getitem(watch: Watch, x: Tensor, index: Any) -> Any:
    if not isinstance(x, SimTensor):  # a CPU tensor by places on the device
        raise watch.problem("indices should be on the CPU or on the indexed tensor's device (cpu)")
    return SimTensor(watch.graphs.run(Tensor.__getitem__, x.elem, _index(watch, index)), watch)


def _setitem(watch: Watch, x: Tensor, index: Any, value: Any) -> None:
    if not isinstance(x, SimTensor):
        watch.count(D2H)
        x[_elems(index)] = _elem(value)
        return
    if isinstance(value, Tensor) and not isinstance(value, SimTensor) and value.dim():
        watch.count(H2D)
    watch.graphs.run(Tensor.__setitem__, x.elem, _index(watch, index), _elem(value), writes=[x.elem])


def _tolist(watch: Watch, x: SimTensor) -> Any:
    if x.elem.numel():
        watch.count(D2H)
    return x.elem.tolist()


def _copy(watch: Watch, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(x, SimTensor) != isinstance(source, SimTensor) and source.numel():
        watch.count(_upload_kind(source, non_blocking) if isinstance(x, SimTensor) else D2H)
    target = _elem(x)
    watch.graphs.run(Tensor.copy_, target, _elem(source), writes=[target])
    return x


def _upload_kind(source: Tensor, is_async: bool) -> str:
    return H2D if not is_async else ASYNC if _is_pinned(source) else STAGED


def _nonzero(watch: Watch, x: SimTensor, *, as_tuple: bool = False) -> Any:
    watch.count(SHAPE)
    return _wrapped(watch, x.elem.nonzero(as_tuple=as_tuple))


def _contiguous(watch: Watch, x: SimTensor, *, memory_format: Any = torch.contiguous_format) -> SimTensor:
    """C++ would make room on the device by itself."""
    return x if x.elem.is_contiguous() else SimTensor(watch.graphs.run(Tensor.contiguous, x.elem), watch)


def _no_pointer(watch: Watch, *_: Any) -> Any:
    raise watch.problem("a pointer to the device's memory is of no use on the host")


def _sdpa(watch: Watch, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    parts = [q, k, v, *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))]
    if not all(isinstance(part, SimTensor) for part in parts):
        raise watch.problem("attention over tensors of two devices")
    on = torch.backends.cuda
    watch.sdpa.add(
        (on.flash_sdp_enabled(), on.mem_efficient_sdp_enabled(), on.math_sdp_enabled(), on.cudnn_sdp_enabled())
    )
    args, kwargs = _elems(args), {name: _elem(x) for name, x in kwargs.items()}
    with _here():
        out = watch.graphs.run(F.scaled_dot_product_attention, _elem(q), _elem(k), _elem(v), *args, **kwargs)
    return SimTensor(out, watch)


_METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    Tensor.tolist: _tolist,
    Tensor.nonzero: _nonzero,
    Tensor.copy_: _copy,
    Tensor.contiguous: _contiguous,
    Tensor.numpy: _no_pointer,
    Tensor.data_ptr: _no_pointer,
    Tensor.untyped_storage: lambda watch, x: x.elem.untyped_storage(),
    Tensor.__invert__: lambda watch, x: x.bitwise_not(),
    F.scaled_dot_product_attention: _sdpa,
}


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """On the CPU, whatever is simulated around it."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        yield


# ---- operators ----


def _run(watch: Watch, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    space, name = func._schema.name.split("::")
    tensors = _tensors(args, kwargs)
    sims = [x for x in tensors if isinstance(x, SimTensor)]
    if space == "q3vl" and sims:
        if name not in _OPERATORS:
            raise watch.problem(f"{func} has no kernel for CUDA")
        with _modes(watch):
            return _OPERATORS[name](*args, **kwargs)
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    is_on_device = target.type == "cuda" if target is not None else bool(sims)
    _look(watch, func, name, args, kwargs, tensors, is_on_device)
    args, kwargs = _elems(tuple(args)), {name: _elems(x) for name, x in kwargs.items()}
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    out = watch.graphs.operator(func, args, kwargs) if is_on_device or sims else func(*args, **kwargs)
    if name.endswith("_") and not name.endswith("__"):
        return tensors[0]
    return _wrapped(watch, out) if is_on_device else out


def _look(
    watch: Watch, func: Any, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], is_on_device: bool
) -> None:
    """Count what a device would have waited for; raises what it would have raised."""
    sims = [x for x in tensors if isinstance(x, SimTensor)]
    if name == "_to_copy":
        if is_on_device and not sims and args[0].numel():
            watch.count(_upload_kind(args[0], bool(kwargs.get("non_blocking"))))
        if not is_on_device and sims and args[0].numel():
            watch.count(D2H)
        return
    if not sims:
        return
    if name in ("_local_scalar_dense", "equal"):
        watch.count(ITEM)
    if name in _SHAPES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        watch.count(SHAPE)
    if name in _INDEXED:
        _index(watch, tuple(x for x in args[1] if x is not None))
        others = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor)]
    else:
        others = list(tensors)
    if any(not isinstance(x, SimTensor) and x.dim() for x in others):
        raise watch.problem(f"{func}: tensors on cuda:0 and on the cpu")
    if name == "_grouped_mm":
        _look_at_grouped(watch, args[0], args[1])


def _look_at_grouped(watch: Watch, *matrices: SimTensor) -> None:
    for x in matrices:
        if x.dtype != torch.bfloat16:
            raise watch.problem(f"grouped_mm: expected inputs of BF16 type, got {x.dtype}")
        strides = [stride * x.element_size() for stride in x.stride() if stride != 1]
        if any(stride % 16 for stride in strides) or x.elem.storage_offset() * x.element_size() % 16:
            raise watch.problem(f"grouped_mm: {tuple(x.shape)} by {x.stride()} does not begin at multiples of 16 bytes")


_pinned: set[int] = set()


def _pin(x: Tensor) -> Tensor:
    """A copy that counts as pinned for as long as it lives, with all views of it."""
    made = x.clone()
    number = made.untyped_storage()._cdata
    _pinned.add(number)
    weakref.finalize(made, _pinned.discard, number)
    return made


def _is_pinned(x: Tensor) -> bool:
    return x.untyped_storage()._cdata in _pinned


# ---- what has no tensor of the device among its arguments ----


class _Operators(TorchDispatchMode):
    """Factories, and copies to the device."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(self._watch, func, args, dict(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Tensors from Python's numbers, and pinned memory."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(x, torch.device) for x in args) or "device" in kwargs:
            # Without an index C++ would ask the device which one.
            args = tuple(DEVICE if isinstance(x, torch.device) and x.type == "cuda" else x for x in args)
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
                kwargs["device"] = DEVICE
        is_pinned = kwargs.pop("pin_memory", False)
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            on_device = device is not None and torch.device(device).type == "cuda"
            source = args[0] if args else kwargs["data"]
            if isinstance(source, SimTensor) and device is None:
                return source
            made = func(*args, **kwargs) if not isinstance(source, SimTensor) else source
            if on_device and not isinstance(made, SimTensor):
                self._watch.count(H2D)
                made = SimTensor(made, self._watch)
        elif func is Tensor.pin_memory:
            return _pin(args[0])
        else:
            made = _call(func, args, kwargs)
        return _pin(made) if is_pinned else made


@contextlib.contextmanager
def _modes(watch: Watch) -> Iterator[None]:
    with _Functions(watch), _Operators(watch):
        yield


def _place() -> str:
    """The innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "qwen3vl_disagg/" in path:
            return f"{path.rsplit('qwen3vl_disagg/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


# ---- parts that stand for what only a device has ----


def _attention_by_lists(kind: flex.FlexKind) -> Callable[..., Tensor]:
    """What the compiled kernel computes, from the pages that its lists name and no others."""

    def attend(q: SimTensor, k_pool: SimTensor, v_pool: SimTensor, *lists: SimTensor) -> SimTensor:
        with _here():
            return SimTensor(q.watch.graphs.run(compute, *map(_elem, (q, k_pool, v_pool, *lists))), q.watch)

    def compute(q_RNMH: Tensor, keys: Tensor, values: Tensor, *lists: Tensor) -> Tensor:
        num_partial, partial, offset, starts, *rest = lists
        mask_mod = flex.block_mask(kind, len(keys), num_partial, partial, offset, starts).mask_mod
        out = torch.zeros_like(q_RNMH, dtype=torch.float32)
        row_M1, group = torch.arange(q_RNMH.shape[2])[:, None], q_RNMH.shape[1] // keys.shape[1]
        for r in range(len(q_RNMH)):
            pages = partial[r, : num_partial[r]].long()
            full = rest[1][r, : rest[0][r]].long() if rest else pages[:0]
            listed = (torch.cat([pages, full])[:, None] * kind.page_size + torch.arange(kind.page_size)).flatten()
            if not len(listed):
                continue
            sees_ML = mask_mod(torch.tensor(r), torch.tensor(0), row_M1, listed)
            sees_ML[:, len(pages) * kind.page_size :] = True
            k, v = (pool[listed].float().transpose(0, 1).repeat_interleave(group, 0) for pool in (keys, values))
            scores = (q_RNMH[r].float() @ k.transpose(1, 2)) * q_RNMH.shape[3] ** -0.5
            weights = scores.masked_fill(~sees_ML, float("-inf")).softmax(-1)
            out[r] = weights.nan_to_num(0.0) @ v  # a row that sees nothing comes out as zeros
        return out.to(q_RNMH.dtype)

    return attend


def _compile(run: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """Uncompiled, but told that it is."""

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
            return run(*args, **kwargs)

    return call


def to_device(module: nn.Module, watch: Watch) -> nn.Module:
    """In place, as `module.to("cuda")` would."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and not isinstance(parameter, SimTensor):
                part._parameters[name] = nn.Parameter(SimTensor(parameter.detach(), watch), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and not isinstance(buffer, SimTensor):
                part._buffers[name] = SimTensor(buffer, watch)
    return module


class _NoGrad:
    """In place of inference mode, in which tensors of a subclass cannot be written."""

    def __enter__(self) -> None:
        self._guard = torch.no_grad()
        self._guard.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._guard.__exit__(*error)


@contextlib.contextmanager
def simulated(*, free_bytes: int = 64 << 20, num_devices: int = 1) -> Iterator[Watch]:
    """One device, or several of which nothing is computed on but the first; also in threads that begin meanwhile."""
    torch._dynamo.trace_rules.get_torch_obj_rule_map()  # knows functions by what they are now, for good
    watch = Watch()
    run_thread = threading.Thread.run

    def run_in_modes(thread: threading.Thread) -> None:
        with _modes(watch):
            run_thread(thread)

    guards = {
        "is_available": lambda: True,
        "device_count": lambda: num_devices,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda *_: None,
        "mem_get_info": lambda *_: (free_bytes, free_bytes),
        "_lazy_init": lambda: None,
    }
    before = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for name, stand_in in guards.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", _NoGrad.__enter__))
        stack.enter_context(mock.patch.object(torch.inference_mode, "__exit__", _NoGrad.__exit__))
        stack.enter_context(mock.patch.object(torch, "compile", _compile))
        stack.enter_context(mock.patch.object(torch._dynamo, "mark_dynamic", mark_nothing))
        stack.enter_context(mock.patch.object(flex, "compiled_attention", _attention_by_lists))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_in_modes))
        stack.enter_context(watch.graphs.simulated())
        stack.enter_context(_modes(watch))
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield watch
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
