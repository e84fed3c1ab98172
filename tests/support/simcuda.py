"""A CUDA device that is not there, for tests of everything but its kernels.

`simulated()` makes tensors that say `cuda:0` and compute on the CPU, and a `Watch` that knows what a real device would
have had to say: tensors of two devices in one operator, operators without a CUDA kernel, operands that `grouped_mm`
does not take, and each time the host would have waited. What runs in it is the real code with real numbers: host
logic, devices, copies and the order between streams (`simstreams.py`) are shown by it; kernels, speed and memory are
not.

Compiled regions run uncompiled, and are told that they are compiled. FlexAttention is computed from its block lists.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3vl_disagg.model import flex, moe, paged, quantized, vision
from tests.support.simattention import attention_by_lists, varlen_attn
from tests.support.simcompile import uncompiled
from tests.support.simgraphs import SimGraphs, mark_nothing
from tests.support.simstreams import Order, here, is_pinned, pin, split_uses

DEVICE = torch.device("cuda", 0)
H2D, STAGED, ASYNC, D2H, ITEM, SHAPE = "H2D blocking", "H2D staged", "H2D pinned", "D2H", "item", "shape"
LATE, EVENT = "D2H pinned", "event"
"""Blocking: from memory that can be paged out. Staged: the same, but not waited for, which the driver does not promise.
Item: one number, as `bool` and `.item()` take it. Shape: an operator whose result's shape the host has to learn.
Pinned: not waited for, but by an event."""
_STOPS = (H2D, D2H, ITEM, SHAPE)
WAITS = (*_STOPS, STAGED, EVENT)
_SHAPES = {"nonzero", "unique2", "_unique2", "unique_dim", "unique_consecutive", "masked_select"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_OPERATORS: dict[str, Callable[..., Any]] = {
    "paged_attention": paged._paged_attention,
    "attend_frames": vision._attend_frames_opaque,
    "experts_ungrouped": moe.run_experts_ungrouped,
    "experts_in_slices": moe.run_experts_in_slices,
    "experts_dequantized": quantized.run_experts_dequantized,
    "flex_attention": flex._flex_attention,
}
"""Those of the package's own operators that run on any device, by what they run."""


class Watch:
    """What was seen: `counts` of copies and waits by kind and place, `num_bytes` of copies, `problems` that a
    device would have raised or could not have promised, the `sdpa` backends that were allowed when attention was
    computed (flash, efficient, math, cuDNN), and how often it was `varlen`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.graphs = SimGraphs(self)
        self.order = Order(self.problem, self.count, lambda: self.graphs.is_capturing)
        self.reset()

    def reset(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.num_bytes: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.sdpa: set[tuple[bool, bool, bool, bool]] = set()
        self.varlen = 0

    def count(self, kind: str, num_bytes: int = 0) -> None:
        if kind in WAITS:
            self.graphs.refuse(kind, is_pageable=kind == STAGED)
        with self._lock:
            self.counts[kind, _place()] += 1
            self.num_bytes[kind, _place()] += num_bytes
        if kind in _STOPS:
            self.order.learn(self.order.clock(self.order.current))

    def problem(self, message: str) -> RuntimeError:
        with self._lock:
            self.problems.append(f"{message}, at {_place()}")
        return RuntimeError(message)

    def of(self, *kinds: str) -> int:
        return sum(number for (kind, _), number in self.counts.items() if kind in kinds)

    def bytes_of(self, kind: str, file: str = "") -> int:
        """Copied by lines of that file, or of any."""
        return sum(number for (of, place), number in self.num_bytes.items() if of == kind and place.startswith(file))

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
    found = watch.graphs.run(Tensor.__getitem__, x.elem, _index(watch, index))
    if found.untyped_storage()._cdata != x.elem.untyped_storage()._cdata:
        watch.order.tag(watch.order.step([x.elem], []), [found])
    return SimTensor(found, watch)


def _setitem(watch: Watch, x: Tensor, index: Any, value: Any) -> None:
    if not isinstance(x, SimTensor):
        watch.count(D2H)
        x[_elems(index)] = _elem(value)
        return
    watch.order.step([value.elem] if isinstance(value, SimTensor) else [], [x.elem])
    if isinstance(value, Tensor) and not isinstance(value, SimTensor) and value.dim():
        watch.count(H2D)
    watch.graphs.run(Tensor.__setitem__, x.elem, _index(watch, index), _elem(value), writes=[x.elem])


def _tolist(watch: Watch, x: SimTensor) -> Any:
    if x.elem.numel():
        watch.order.step([x.elem], [])
        watch.count(D2H)
    return x.elem.tolist()


def _copy(watch: Watch, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    is_up, target, given = isinstance(x, SimTensor), _elem(x), _elem(source)
    step = watch.order.step(*_touched((source,), (x,)))
    kind = ""
    if is_up != isinstance(source, SimTensor) and source.numel():
        kind = _upload_kind(source, non_blocking) if is_up else LATE if non_blocking and is_pinned(x) else D2H
        watch.count(kind, x.nbytes)
    with here():
        if kind == LATE:
            watch.order.download(step, target, given)
            return x
        if kind == ASYNC:
            watch.order.upload(step, given)
        watch.graphs.run(Tensor.copy_, target, given, writes=[target])
    return x


def _upload_kind(source: Tensor, is_async: bool) -> str:
    return H2D if not is_async else ASYNC if is_pinned(source) else STAGED


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
    step = watch.order.step([part.elem for part in parts], [])
    with here():
        out = watch.graphs.run(F.scaled_dot_product_attention, _elem(q), _elem(k), _elem(v), *args, **kwargs)
    watch.order.tag(step, [out])
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
    touched = _touched(*split_uses(func, args, kwargs, tensors))
    step = watch.order.enter(func, *touched, is_simulated=is_on_device or bool(sims))
    _look(watch, func, name, args, kwargs, tensors, is_on_device)
    if name == "_to_copy" and is_on_device and step is not None and kwargs.get("non_blocking") and is_pinned(args[0]):
        watch.order.upload(step, args[0])
    args, kwargs = _elems(tuple(args)), {name: _elems(x) for name, x in kwargs.items()}
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    out = watch.graphs.operator(func, args, kwargs) if is_on_device or sims else func(*args, **kwargs)
    if name.endswith("_") and not name.endswith("__"):
        return tensors[0]
    if step is not None and is_on_device:
        held = {x.untyped_storage()._cdata for x in map(_elem, tensors)}
        watch.order.tag(step, [x for x in _tensors([out], {}) if x.untyped_storage()._cdata not in held])
    return _wrapped(watch, out) if is_on_device else out


def _touched(reads: Sequence[Tensor], writes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of these what lies on the device, or may have copies from and to it under way."""
    kept = [[_elem(x) for x in part if isinstance(x, SimTensor) or is_pinned(x)] for part in (reads, writes)]
    return kept[0], kept[1]


def _look(
    watch: Watch, func: Any, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], is_on_device: bool
) -> None:
    """Count what a device would have waited for; raises what it would have raised."""
    sims = [x for x in tensors if isinstance(x, SimTensor)]
    if name == "_to_copy":
        if is_on_device and not sims and args[0].numel():
            watch.count(_upload_kind(args[0], bool(kwargs.get("non_blocking"))), args[0].nbytes)
        if not is_on_device and sims and args[0].numel():
            watch.count(D2H, args[0].nbytes)
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
            return pin(args[0])
        else:
            made = _call(func, args, kwargs)
        return pin(made) if is_pinned else made


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
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (free_bytes, free_bytes),
        "_lazy_init": lambda: None,
    }
    before = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for name, stand_in in guards.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", _NoGrad.__enter__))
        stack.enter_context(mock.patch.object(torch.inference_mode, "__exit__", _NoGrad.__exit__))
        stack.enter_context(uncompiled())
        stack.enter_context(mock.patch.object(torch._dynamo, "mark_dynamic", mark_nothing))
        stack.enter_context(mock.patch.object(flex, "compiled_attention", attention_by_lists))
        stack.enter_context(mock.patch.object(varlen, "varlen_attn", varlen_attn))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_in_modes))
        stack.enter_context(watch.order.simulated())
        stack.enter_context(watch.graphs.simulated())
        stack.enter_context(_modes(watch))
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield watch
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
