"""Compiles the C++ kernels for this machine, once, and loads them.

They are built for the processor they run on, so they are not shipped as a binary: the first use takes a few seconds of
the C++ compiler that `torch.compile` needs too. Without a compiler or without AVX-512 BF16, nothing is loaded and the
PyTorch code runs; a cache that cannot be used or trusted costs the time of building anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from qwen3vl_disagg.core.environment import KERNELS, variable
from qwen3vl_disagg.kernels.library_cache import LibraryCache, cache_folder, open_library

logger = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-exceptions", "-w")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_bf16")
_COMPILE_S = 120.0
"""For one source; the slowest takes 3 s."""
_MAX_WORDS = 300

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "q3_replay": [_P, _L, _L, _I],
    "q3_rotary": [_P, _L, _P, _P, _F, _P, _P, _L, _L, _I],
    "q3_route": [_P] * 3 + [_L] * 3 + [_I],
    "q3_largest": [_P] * 5 + [_L] * 2 + [_I],
    "q3_linear": [_P, _P, _P, _L, _P, _P, _L, _L, _L, _I, _I],
    "q3_many_rows": [_P, _P, _P, _L, _P, _I, _L, _P, _P, _L, _L, _L, _I],
    "q3_has_tiles": [_P],
    "q3_experts": [_P] * 9 + [_L] * 5 + [_I] * 2,
    "q3_swiglu": [_P, _L, _P, _L, _P, _L, _L, _I],
    "q3_linear_int8": [_P] * 5 + [_L] * 3 + [_I],
    "q3_experts_int8": [_P] * 12 + [_L] * 5 + [_I],
    "q3_prefill_attention": [_P, _L, _P, _P, _P, _L, _L, _L, _L, _P, _P, _I],
    "q3_full_attention": [_P, _P, _P, _L, _L, _L, _L, _P, _P, _I, _I],
    "q3_decode_attention": [_P, _P, _L, _P, _L, _P, _P, _P, _L, _P, _P, _L, _L, _L, _L, _L, _P, _I],
    "q3_rotate": [_P, _L, _P, _P, _L, _L, _L, _I],
    "q3_gelu_tanh": [_P, _L, _I],
    "q3_rms_norm": [_P, _P, _F, _P, _L, _L, _I],
    "q3_add_rms_norm": [_P, _P, _P, _F, _P, _P, _L, _L, _I],
    "q3_norm_rotary": [_P, _L, _P, _F, _P, _P, _P, _L, _L, _L, _I],
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty elsewhere."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def compiler_command() -> list[str]:
    """`$CXX`, which may have arguments (`ccache g++`), else g++ or clang++. FileNotFoundError without any."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        return command
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise FileNotFoundError("no C++ compiler: neither $CXX nor g++ nor clang++")
    return [found]


def library_name(compiler: list[str]) -> str:
    """For these sources, flags, compiler and this processor."""
    text = b"\0".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    key = hashlib.sha256(text + repr((FLAGS, compiler, sorted(cpu_flags()))).encode()).hexdigest()[:16]
    return f"kernels-{key}.so"


def compile_kernels(compiler: list[str]) -> bytes:
    """The library. OSError, or SubprocessError with the compiler's words."""
    with tempfile.TemporaryDirectory(prefix="q3vl-kernels-") as scratch:
        # Linked without an OpenMP of its own: the one that torch has loaded is used, with its threads.
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(str(Path(scratch) / f"{source.stem}.o"))
            _run([*compiler, *FLAGS, "-c", str(source), "-o", objects[-1]])
        made = Path(scratch) / "kernels.so"
        _run([*compiler, "-shared", *objects, "-o", str(made), "-nodefaultlibs", "-lc", "-lm"])
        return made.read_bytes()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_COMPILE_S)


def bind(content: bytes) -> ctypes.CDLL:
    """The library with the types of its functions. OSError if it is none, AttributeError if one is missing."""
    library = open_library(content)
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


@functools.cache
def load() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot run. One line of the log says why, or why they are not kept, unless they
    were switched off or are not made for this processor."""
    if variable(KERNELS) == "off" or not set(NEEDED) <= cpu_flags() or not torch.backends.openmp.is_available():
        return None
    try:
        compiler = compiler_command()
        library, trouble = _library(library_name(compiler), compiler)
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError) as error:
        logger.warning("kernels not built, running without them: %s", _words(error))
        return None
    if trouble is not None:
        logger.warning("kernels built for this process alone, there is no cache: %s", _words(trouble))
    return library


def _library(name: str, compiler: list[str]) -> tuple[ctypes.CDLL, OSError | None]:
    """The library, kept or made; and what stood in the way of keeping it."""
    cache, trouble = None, None
    with contextlib.ExitStack() as stack:
        try:
            cache = stack.enter_context(LibraryCache.open(cache_folder()))
            kept = _usable(cache.read(name))
            if kept is None:
                stack.enter_context(cache.alone())
                kept = _usable(cache.read(name))  # made while this process waited
            if kept is not None:
                return kept, None
        except OSError as error:
            trouble = error
        logger.info("building the CPU kernels for this processor, once")
        content = compile_kernels(compiler)
        library = bind(content)
        try:
            if cache is not None:
                cache.write(name, content)
        except OSError as error:
            trouble = error
        return library, trouble


def _usable(content: bytes | None) -> ctypes.CDLL | None:
    try:
        return None if content is None else bind(content)
    except (OSError, AttributeError):
        return None


def _words(error: Exception) -> str:
    """One line: where the compiler said something, its first complaint."""
    said = getattr(error, "stderr", None) or b""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else str(error))[:_MAX_WORDS]
