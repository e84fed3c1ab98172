"""The checkpoint folder of a job. A repository of the hub is fetched once on each host, by its first worker; all other
processes are told the folder, and never ask the hub."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn

import msgspec

from qwen3vl_disagg.checkpoint.download import hub_id, resolve_model_folder
from qwen3vl_disagg.cluster.rendezvous import Published, World, find, meeting_path, publish
from qwen3vl_disagg.cluster.slots import die_with_parent
from qwen3vl_disagg.core.errors import CheckpointError, DisaggError, InputError

logger = logging.getLogger(__name__)


class _Fetched(Published, frozen=True, kw_only=True):
    """What a host's first worker tells the others."""

    folder: str


class _Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the fetching process tells its worker: a folder, or why there is none."""

    folder: str = ""
    reason: str | None = None
    problems: list[str] = []


def shared_model_folder(model: str | None, world: World) -> str | None:
    """`--model` as this process is to use it: as given, or the folder of a hub's repository.

    The host's first worker fetches; the others wait as long as it lives. InputError and CheckpointError as from
    `resolve_model_folder`, for the first worker only: torchrun ends the others when it leaves.
    """
    if model is None or hub_id(model) is None:
        return model
    path = meeting_path().with_suffix(".model")
    if world.local_rank != 0:
        return find(path, _Fetched).folder
    folder = _resolve_in_child(model)
    if world.num_local_ranks > 1:
        atexit.register(path.unlink, missing_ok=True)
        publish(path, _Fetched(folder=folder, pid=os.getpid()))
    return folder


def _resolve_in_child(model: str) -> str:
    """`resolve_model_folder` in a process of its own: the hub's client leaves threads behind, and a slot forks."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _resolve_and_tell(model, writing, parent)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    if not told:
        raise DisaggError(f"--model {model}: the process that fetched it died")
    outcome = msgspec.json.decode(told, type=_Outcome)
    if outcome.problems:
        raise CheckpointError(outcome.folder, outcome.problems)
    if outcome.reason is not None:
        raise InputError(outcome.reason, param="model")
    return outcome.folder


def _resolve_and_tell(model: str, writing: int, parent: int) -> NoReturn:
    """In the child, to its end."""
    try:
        die_with_parent(parent)
        try:
            outcome = _Outcome(folder=str(resolve_model_folder(model)))
        except CheckpointError as error:
            outcome = _Outcome(folder=error.folder, problems=error.problems)
        except InputError as error:
            outcome = _Outcome(reason=error.message)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(msgspec.json.encode(outcome))
    except BaseException:
        logger.exception("fetching %s failed", model)
    finally:
        os._exit(0)
