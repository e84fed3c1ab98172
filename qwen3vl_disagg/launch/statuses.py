"""With which status the workers of `qwen3vl-disagg serve` have left: torchrun's agent does not say after a signal."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen3vl_disagg.cluster.rendezvous import World, private_folder
from qwen3vl_disagg.core.errors import InputError

_NONE = 1


def _folder(agent: int) -> Path:
    return private_folder() / f"statuses-{agent}"


@contextlib.contextmanager
def collected_statuses() -> Iterator[Path]:
    """A folder into which the workers of this process write, until the block ends. InputError if it cannot be had."""
    folder = _folder(os.getpid())
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed, and had this number
    try:
        folder.mkdir()
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell_status(status: int) -> None:
    """Of this worker, if its agent collects them. One that cannot be written counts as a failure there."""
    world = World.from_env()
    if not world.has_agent:
        return
    with contextlib.suppress(OSError, InputError):
        folder = _folder(os.getppid())
        if folder.is_dir():
            (folder / str(world.local_rank)).write_text(str(status))


def first_failure(folder: Path, num_workers: int) -> tuple[int, int] | None:
    """(worker, exit status) of the first one that did not end with 0; of one that never said anything, 1."""
    for worker in range(num_workers):
        try:
            status = int((folder / str(worker)).read_text())
        except (OSError, ValueError):
            status = _NONE
        if status:
            return worker, status
    return None
