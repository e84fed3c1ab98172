"""What is installed, and what the card can do at most."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.gpu_steps.plan import DOWNLOAD, FOR_SERVING, FOR_TESTS, NEEDED
from tools.gpu_steps.step import Check

SMI_S, PIP_S = 10.0, 12.0


def distribution(wheel: Path) -> str:
    """The name in the wheel's own metadata. ValueError for what is no wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".dist-info/METADATA"):
                for line in archive.read(name).decode().splitlines():
                    if line.startswith("Name: "):
                        return line.removeprefix("Name: ").strip()
    raise ValueError(f"{wheel.name}: no name in it")


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def wheels(check: Check) -> None:
    """Install the wheels of what is not there, beside the environment, and look at what still lacks."""
    site = check.out / "site"
    if check.wheels is not None:
        missing = [wheel for wheel in sorted(check.wheels.glob("*.whl")) if not is_installed(distribution(wheel))]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
        if missing:
            subprocess.run([*command, *map(str, missing)], check=True, timeout=PIP_S, stdin=subprocess.DEVNULL)
        check.say(installed=[wheel.name for wheel in missing])
    sys.path.insert(1, str(site))
    importlib.invalidate_caches()
    lacks = {
        kind: [name for name in names if importlib.util.find_spec(name) is None]
        for kind, names in (("needed", NEEDED), ("for serving", FOR_SERVING), ("for tests", FOR_TESTS))
    }
    check.say(lacks={kind: names for kind, names in lacks.items() if names})
    if lacks["needed"]:
        raise RuntimeError(f"not installed, nor among the wheels: {', '.join(lacks['needed'])}. Elsewhere: {DOWNLOAD}")


def smi() -> str:
    """A line of `nvidia-smi`, or why there is none."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return "no nvidia-smi"
    fields = "name,driver_version,memory.total,memory.used,clocks.max.sm,clocks.max.mem,power.limit"
    command = [path, f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True).stdout.strip()


def rates(check: Check) -> None:
    """Bytes per second of a copy (read and written), and operations per second of a large product."""
    import torch

    from tools.gpu_steps.sizes import least_ms

    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "tokenizers"):
        versions[name] = metadata.version(name) if is_installed(name) else "none"
    check.say(versions=versions, cuda=torch.version.cuda or "none", cores=len(os.sched_getaffinity(0)))
    with check.part("nvidia-smi"):
        check.say(smi=smi())
    num_bytes, side = (1 << 22, 128) if check.is_dry else (1 << 33, 8192)
    source = torch.ones(num_bytes // 4, device=check.device)
    target = torch.empty_like(source)
    copy_ms = least_ms(check, lambda: target.copy_(source))
    factor = torch.randn(side, side, device=check.device).to(torch.bfloat16)
    product_ms = least_ms(check, lambda: factor @ factor)
    check.say(copy_GB_s=2 * num_bytes / copy_ms / 1e6, matmul_TFLOP_s=2 * side**3 / product_ms / 1e9)
    if check.needs_gpu("memory"):
        free, total = torch.cuda.mem_get_info()
        check.say(memory={"free GiB": free / 2**30, "total GiB": total / 2**30})
