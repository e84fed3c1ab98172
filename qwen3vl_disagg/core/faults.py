"""Faults on purpose, for tests: `Q3VL_FAULT=point:nth:kill|stop|raise` makes the nth passage of a named point fail.
`point:@HEX:..` makes each passage fail that is about an image or clip whose SHA-256 begins so.

Each process counts its own passages. A rank that was started again counts on from a file beside it, so that a point
fails once in a job and not once in each incarnation: `Q3VL_FAULT_MARK` names that file.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_disagg.core.errors import InputError

POINTS = {
    "admitted": "language rank: a request was admitted",
    "before-encode": "encode rank: an item has its grant, its bytes are about to be fetched",
    "in-tower": "encode rank: the patches are about to go through the vision tower",
    "encoded": "encode rank: the rows are there, the header is not out",
    "header-sent": "encode rank: the header is out",
    "mid-payload-sent": "encode rank: half of a payload's messages were posted",
    "payload-sent": "encode rank: a payload is on its way, not acknowledged",
    "mid-payload-received": "language rank: half of a payload's messages are here",
    "payload-received": "language rank: a payload is here, not acknowledged",
    "ack-sent": "language rank: an acknowledgement is out",
    "blocks-full": "language rank: granted rows were consumed, the resume is not out",
    "resume-received": "encode rank: a resume came",
    "last-row": "language rank: the last row of an item is here",
    "before-free": "language rank: an item was consumed, its blocks are not free yet",
    "in-abort": "either rank: an attempt was aborted by the other end",
    "in-handshake": "either rank: a link is being made",
    "in-drain": "either rank: the job is going down",
}
FAULT, FAULT_MARK = "Q3VL_FAULT", "Q3VL_FAULT_MARK"
OF_CONTENTS = ("before-encode", "in-tower")
"""Points that are passed by an image or clip."""
ACTIONS = ("kill", "stop", "raise")
_MAX_DIGITS = 9
STOP_S = 5.0


class InjectedFault(RuntimeError):
    """What `raise` raises."""


@dataclass(frozen=True)
class FaultPlan:
    point: str
    nth: int
    action: str
    content: str | None = None
    """The beginning of a digest, in place of `nth`."""

    @classmethod
    def parse(cls, spec: str) -> FaultPlan:
        """`point:nth:action` or `point:@HEX:action`. InputError for anything else."""
        point, nth, action = ([*spec.split(":"), "", "", ""])[:3]
        is_number = nth.isascii() and nth.isdecimal() and len(nth) <= _MAX_DIGITS and int(nth) > 0
        is_content = re.fullmatch("@[0-9a-f]{8,64}", nth) is not None and point in OF_CONTENTS
        if spec.count(":") != 2 or point not in POINTS or not (is_number or is_content) or action not in ACTIONS:
            expected = f"point:nth:{'|'.join(ACTIONS)}, with a point of `qwen3vl-disagg faults` and nth from 1 on"
            raise InputError(f"{FAULT}={spec[:100]}: must be {expected}", param=FAULT)
        return cls(point, 0, action, nth[1:]) if is_content else cls(point, int(nth), action)


_plan: FaultPlan | None = None
_passages: Counter[str] = Counter()
_lock = threading.Lock()
_checking = threading.local()


@contextlib.contextmanager
def no_faults() -> Iterator[None]:
    """On this thread nothing that passes in the block is counted: a rank's checks of itself are not what is tested."""
    _checking.is_on = True
    try:
        yield
    finally:
        _checking.is_on = False


def plan_faults(environ: Mapping[str, str] = os.environ) -> None:
    """Read `Q3VL_FAULT`; processes forked after this have it too."""
    global _plan
    spec = environ.get(FAULT)
    _plan = FaultPlan.parse(spec) if spec else None
    _passages.clear()


def fault_point(name: str, *digests: str) -> None:
    """Fail here if the environment asked for it. Costs one comparison otherwise. `digests`: of what passes here."""
    if _plan is None or _plan.point != name or getattr(_checking, "is_on", False):
        return
    if _plan.content is not None and not any(digest.startswith(_plan.content) for digest in digests):
        return
    with _lock:
        _passages[name] += 1
        if _plan.content is None and (_passages[name] != _plan.nth or not _claim()):
            return
    if _plan.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _plan.action == "stop":
        # A stopped process cannot wake itself.
        subprocess.Popen(["/bin/sh", "-c", f"sleep {STOP_S}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise InjectedFault(f"fault at {name}")


def check_mark(mark: str | None) -> None:
    """InputError if a file of that name cannot be made."""
    if mark is not None and not Path(mark).parent.is_dir():
        raise InputError(f"{FAULT_MARK}={mark}: its folder does not exist", param=FAULT_MARK)


def _claim() -> bool:
    """Whether no process of this job has failed here before."""
    mark = os.environ.get(FAULT_MARK)
    if mark is None:
        return True
    try:
        with Path(mark).open("x") as file:
            file.write(f"{os.getpid()}\n")
    except FileExistsError:
        return False
    return True
