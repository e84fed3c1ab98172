"""Makes this process believe that it has an H200: inductor and Triton compile to cubins for it, and nothing runs.

Tensors are FakeTensors on `cuda:0`. The driver has a target and no device; what would launch is counted instead. To be
called first thing in a process that does nothing else: it changes PyTorch and Triton for good. Built for the
versions in `VERSIONS`; others may need other changes here.
"""

from __future__ import annotations

import collections
import ctypes
import os
import subprocess
import tempfile
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

VERSIONS = {"torch": "2.13", "triton": "3.7"}
CAPABILITY = (9, 0)
SHARED_BYTES = 227 * 1024
"""That one block of threads may ask for on sm_90."""
_COMPILE_S = 120.0
_H200 = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "total_memory": 141 << 30,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "L2_cache_size": 60 << 20,
    "shared_memory_per_block": 48 << 10,
    "shared_memory_per_block_optin": SHARED_BYTES,
    "shared_memory_per_multiprocessor": 228 << 10,
    "gcnArchName": "",
    "is_integrated": False,
    "is_multi_gpu_board": False,
    "uuid": "0",
    "clock_rate": 1980000,
    "memory_clock_rate": 3201000,
    "memory_bus_width": 6144,
}
_LIMITS = {
    "max_shared_mem": SHARED_BYTES,
    "multiprocessor_count": 132,
    "warpSize": 32,
    "max_num_regs": 65536,
    "sm_clock_rate": 1980000,
    "mem_clock_rate": 3201000,
    "mem_bus_width": 6144,
}


@dataclass(frozen=True)
class Cubin:
    """A kernel that was compiled: bytes of shared memory of a block, of the machine code, warps of a block."""

    name: str
    shared: int
    size: int
    warps: int


@dataclass
class Seen:
    """What was compiled, and what would have been launched, by name."""

    cubins: list[Cubin] = field(default_factory=list)
    launches: collections.Counter[str] = field(default_factory=collections.Counter)

    def clear(self) -> None:
        self.cubins.clear()
        self.launches.clear()


SEEN = Seen()
_MADE_OF_OTHERS = {f"aten::{name}" for name in ("to", "flatten", "reshape", "contiguous")}
"""Which launch what they call, if anything."""


class Counted(FakeTensorMode):
    """Notes each operator on tensors without memory; not those of which it is made up."""

    depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _MADE_OF_OTHERS:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if self.depth == 0 and any(is_fake(arg) for arg in args):
            SEEN.launches[func._schema.name] += 1
        self.depth += 1
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.depth -= 1


MODE = Counted(allow_non_fake_inputs=True)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with MODE:
        return torch.empty(*shape, dtype=dtype, device="cuda:0")


def as_fake(x: Tensor) -> Tensor:
    """The same shape and strides."""
    with MODE:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")


def is_fake(x: Any) -> bool:
    return isinstance(x, FakeTensor)


def have_an_h200() -> None:
    """Change this process. ImportError without Triton."""
    folder = tempfile.mkdtemp(prefix="gpu-compile-")
    os.environ |= {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }
    _load_guard(Path(folder))
    _change_torch_cuda()
    _change_triton()
    _change_inductor()


def _load_guard(folder: Path) -> None:
    library, root = folder / "guard.so", Path(torch.__file__).parent
    flags = ["-shared", "-fPIC", "-O0", "-w", "-std=c++20", f"-I{root / 'include'}"]
    source = str(Path(__file__).parent / "guard.cpp")
    command = ["g++", *flags, source, "-o", str(library), f"-L{root / 'lib'}", "-lc10"]
    subprocess.run(command, check=True, timeout=_COMPILE_S, stdin=subprocess.DEVNULL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _change_torch_cuda() -> None:
    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(**_H200)
    random_state = torch.get_rng_state
    cuda._initialized, torch.version.cuda = True, "13.0"
    for name, value in {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "_get_device_properties": properties,
        "get_device_capability": CAPABILITY,
        "get_device_name": _H200["name"],
        "synchronize": None,
        "set_device": None,
        "_is_compiled": True,
        "get_arch_list": ["sm_90"],
        "is_bf16_supported": True,
        "set_rng_state": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }.items():
        setattr(cuda, name, lambda *_, _value=value, **__: _value)
    cuda.get_rng_state = lambda *_: random_state()
    for name in ("_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        if not hasattr(torch._C, name):
            setattr(torch._C, name, lambda *_: 0)


class _Driver:
    """A target without a device."""

    launcher_cls = None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_device_capability(self, _: int = 0) -> tuple[int, int]:
        return CAPABILITY

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @property
    def utils(self) -> Any:
        return types.SimpleNamespace(get_device_properties=lambda _: dict(_LIMITS))


def _change_triton() -> None:
    import triton.backends
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    made: Any = _Driver()
    driver.set_active(made)
    driver._default = made
    triton.backends.backends["nvidia"].driver.is_active = staticmethod(lambda: True)

    def without_handles(self: Any) -> None:
        if self.module is not None:
            return
        self.module, self.function, self.n_regs, self.n_spills = 1, 1, 0, 0
        self._run = lambda *_, **__: None
        data = self.metadata
        SEEN.cubins.append(Cubin(data.name, data.shared, len(self.asm.get("cubin", b"")), data.num_warps))

    CompiledKernel._init_handles = without_handles


def _change_inductor() -> None:
    import torch._functorch.config
    import torch._inductor.config
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import fuse_attention
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    torch._inductor.config.use_static_triton_launcher = False
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.force_disable_caches = True
    torch._functorch.config.enable_autograd_cache = False
    interface: Any = CudaInterface
    for name in ("exchange_device", "maybe_exchange_device", "get_raw_stream"):
        setattr(interface, name, staticmethod(lambda *_: 0))
    interface.synchronize = staticmethod(lambda *_: None)
    changed: Any = fuse_attention
    changed._sfdp_init = lambda *_, **__: None
    helpers: Any = triton_helpers
    helpers.set_driver_to_gpu = lambda: None

    def launch(self: Any, *_: Any, **__: Any) -> None:
        SEEN.launches[f"triton {self.fn.__name__}"] += 1

    autotuner: Any = CachingAutotuner
    autotuner.run = launch
    _change_allocation()
    _change_indexing()


def _change_allocation() -> None:
    """What compiled code allocates is fake, what the tracer allocates is on the meta device."""

    def strided(size: Any, stride: Any, dtype: Any) -> Tensor:
        with MODE:
            return torch.empty_strided(size, stride, dtype=dtype, device="cuda:0")

    def reinterpret(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return x.as_strided(size, stride, x.storage_offset() + offset)

    guards: Any = torch._C._dynamo.guards
    guards._empty_strided_cuda, guards._reinterpret_tensor = strided, reinterpret
    _KEPT.append(library := torch.library.Library("aten", "IMPL"))
    library.impl(
        "empty_strided",
        lambda size, stride, dtype=None, layout=None, device=None, pin_memory=None: torch.empty_strided(
            size, stride, dtype=dtype, device="meta"
        ),
        "CUDA",
    )
    library.impl(
        "empty.memory_format",
        lambda size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None: torch.empty(
            size, dtype=dtype, device="meta"
        ),
        "CUDA",
    )


_KEPT: list[torch.library.Library] = []


def _change_indexing() -> None:
    """FlexAttention's tracer makes a tensor on the GPU of an integer index; here it is a constant on the CPU."""
    from torch._dynamo import _trace_wrapped_higher_order_op as traced
    from torch.utils import _pytree

    def get_item(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            places = _pytree.tree_leaves(args[1])
            if all(isinstance(place, (Tensor, int)) for place in places):
                tensors = [p if isinstance(p, Tensor) else torch.tensor(p, dtype=torch.int64) for p in places]
                return traced.mod_index(args[0], tensors)
        return func(*args, **(kwargs or {}))

    changed: Any = traced.TransformGetItemToIndex
    changed.__torch_function__ = get_item
