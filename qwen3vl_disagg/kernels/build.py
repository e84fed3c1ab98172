"""Compiles the C++ kernels for this machine, once, and loads them.

They are built for the processor they run on, so they are not shipped as a binary: the first use takes a few seconds of
the C++ compiler that `torch.compile` needs too. Without a compiler or without AVX-512 BF16, nothing is loaded and the
PyTorch code runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-exceptions", "-w")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_bf16")
SWITCH = "Q3VL_KERNELS"
"""Environment variable; `off` runs the PyTorch code."""

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "q3_linear": [_P, _P, _P, _L, _P, _L, _L, _L, _I],
    "q3_experts": [_P] * 9 + [_L] * 5 + [_I],
    "q3_linear_int8": [_P] * 5 + [_L] * 3 + [_I],
    "q3_experts_int8": [_P] * 12 + [_L] * 5 + [_I],
    "q3_prefill_attention": [_P, _L, _P, _P, _P, _L, _L, _L, _L, _P, _P, _I],
    "q3_full_attention": [_P, _P, _P, _L, _L, _L, _L, _P, _P, _I],
    "q3_decode_attention": [_P, _P, _L, _P, _L, _P, _P, _P, _L, _P, _P, _L, _L, _L, _L, _L, _P, _I],
    "q3_rms_norm": [_P, _P, _F, _P, _L, _L, _I],
    "q3_norm_rotary": [_P, _L, _P, _F, _P, _P, _P, _L, _L, _L, _I],
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty elsewhere."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3vl-disagg" / "kernels"


def compile_kernels(folder: Path) -> Path:
    """The library for these sources, flags and this processor; made if it is not in `folder` yet.

    Raises OSError, or CalledProcessError with the compiler's words.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: neither $CXX nor g++ nor clang++")
    sources = sorted(SOURCES.glob("*.cpp"))
    text = b"\0".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    key = hashlib.sha256(text + repr((FLAGS, compiler, sorted(cpu_flags()))).encode()).hexdigest()[:16]
    library = folder / f"kernels-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Linked without an OpenMP of its own: the one that torch has loaded is used, with its threads.
        objects = [str(Path(scratch) / f"{path.stem}.o") for path in sources]
        for source, target in zip(sources, objects, strict=True):
            subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", target], check=True, capture_output=True)
        made = Path(scratch) / "kernels.so"
        command = [compiler, "-shared", *objects, "-o", str(made), "-nodefaultlibs", "-lc", "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(made, library)  # ranks that start together each make one; the last is as good as the first
    return library


@functools.cache
def load() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot run; then one line on stderr says why, unless they were switched off."""
    if os.environ.get(SWITCH) == "off" or not set(NEEDED) <= cpu_flags():
        return None
    if torch.backends.openmp.is_available() is False:
        return None
    try:
        library = ctypes.CDLL(str(compile_kernels(cache_folder())))
    except (OSError, subprocess.CalledProcessError) as error:
        words = getattr(error, "stderr", None) or str(error).encode()
        print(f"kernels not built, running without them: {words.decode(errors='replace').strip()}", file=sys.stderr)
        return None
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
