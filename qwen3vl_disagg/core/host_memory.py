"""Memory that this host, or the control group that this process is in, has left."""

from __future__ import annotations

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """What can be had without pushing anything out. 0 where the system does not tell."""
    found = []
    meminfo = _text(root / "proc/meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    group = next((line[3:] for line in _text(root / "proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    folders = [root / "sys/fs/cgroup" / group.strip("/"), root / "sys/fs/cgroup"]
    for folder in folders:
        limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            caches = dict(line.split() for line in _text(folder / "memory.stat").splitlines() if line.count(" ") == 1)
            found.append(max(0, int(limit) - int(used) + int(caches.get("inactive_file", 0))))
            break
    old = root / "sys/fs/cgroup/memory"
    limit, used = (_text(old / f"memory.{name}_in_bytes").strip() for name in ("limit", "usage"))
    if limit.isdecimal() and used.isdecimal():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
