"""What every process of the server holds now, by name."""

from __future__ import annotations

from tools.chaos_parts.growth import Sample
from tools.chaos_parts.job import Server
from tools.chaos_parts.processes import measure


def watch(server: Server, at: float) -> list[Sample]:
    """Ranks by role and number, `slot of` their parents, `child of` what they started; nothing of what has ended."""
    try:
        names = {rank.process.pid: rank.name for rank in server.ranks()}
    except OSError:
        return []  # without a frontend nobody says who is who; the next look is soon
    found = []
    for command in server.commands():
        below = command.remember()
        slots = {below[pid].parent: name for pid, name in names.items() if pid in below}
        for process in below.values():
            if process.pid in names:
                name = names[process.pid]
            elif process.pid in slots:
                name = f"slot of {slots[process.pid]}"
            elif process.parent in names:
                name = f"child of {names[process.parent]}"
            else:
                continue  # one that is being started, or a child that a child had
            if (sample := measure(process, name, at)) is not None:
                found.append(sample)
    return found
