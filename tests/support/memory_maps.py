"""What the kernel says about this process's memory."""

import threading
from pathlib import Path


def asks_for_huge_pages(address: int) -> bool | None:
    """Whether the mapping around `address` was asked for on huge pages (`hg` in its flags); None: nobody can know."""
    maps, huge = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage")
    if not maps.exists() or not huge.exists():
        return None
    is_inside = False
    for line in maps.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            is_inside = start <= address < stop
        elif first == "VmFlags:" and is_inside:
            return "hg" in rest.split()
    return False


def settled() -> None:
    """Wait until nothing of this process touches memory ahead: other tests' engines may still be at it."""
    for thread in threading.enumerate():
        if thread.name == "TouchedAhead":
            thread.join(30)
