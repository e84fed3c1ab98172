"""With which status the workers of `qwen3vl-disagg serve` have left: torchrun's agent does not say after a signal."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qwen3vl_disagg.cluster.rendezvous import World, private_folder
from qwen3vl_disagg.core.errors import InputError

_PREFIX = "statuses-"
_RUNNING = "running"


def _folder(agent: int) -> Path:
    return private_folder() / f"{_PREFIX}{agent}"


@contextlib.contextmanager
def collected_statuses() -> Iterator[Path]:
    """A folder into which the workers of this process write, until the block ends. InputError if it cannot be had."""
    folder = _folder(os.getpid())
    _sweep(folder.parent)
    try:
        folder.mkdir()
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """What processes left that were killed; one of them may have had the number of this one."""
    for folder in parent.glob(f"{_PREFIX}*"):
        number = folder.name.removeprefix(_PREFIX)
        if number.isdecimal() and (int(number) == os.getpid() or not Path("/proc", number).exists()):
            shutil.rmtree(folder, ignore_errors=True)


def tell_running() -> None:
    """This worker is a slot: a signal no longer ends it at once, and from now on it has to say how it left."""
    _tell(_RUNNING)


def tell_status(status: int) -> None:
    """Of this worker, if its agent collects them. A slot that cannot write it counts as a failure there."""
    _tell(str(status))


def _tell(what: str) -> None:
    world = World.from_env()
    if not world.has_agent:
        return
    with contextlib.suppress(OSError, InputError):
        folder = _folder(os.getppid())
        if folder.is_dir():
            (folder / str(world.local_rank)).write_text(what)


def first_failure(folder: Path, num_workers: int) -> tuple[int, int] | None:
    """(worker, exit status) of the first one that did not end with 0, after a signal; 1 of a slot that did not say it.

    One that said nothing at all was ended by the signal while it still imported: there was nothing to end cleanly.
    """
    for worker in range(num_workers):
        try:
            status = int((folder / str(worker)).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            status = 1
        if status:
            return worker, status
    return None
