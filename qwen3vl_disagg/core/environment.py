"""The environment variables `Q3VL_*`: which there are, and what they may be."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.faults import FAULT, FAULT_MARK, FaultPlan, check_mark

PREFIX = "Q3VL_"
KERNELS, CAPTURE, GRAPHS = "Q3VL_KERNELS", "Q3VL_CAPTURE", "Q3VL_GRAPHS"
TOKEN, API_KEY = "Q3VL_TOKEN", "Q3VL_API_KEY"
VALUES = {
    KERNELS: ("on", "off"),  # `off` runs the PyTorch code
    CAPTURE: ("on", "off"),  # `off` runs each decode step from Python
    GRAPHS: ("count", "fail"),  # say how many graphs there are; `fail` makes a later one an error, too
}
NAMES = (*VALUES, TOKEN, API_KEY, FAULT, FAULT_MARK, "Q3VL_ACCEPTANCE", "Q3VL_ATTACK_S", "Q3VL_ATTACKS")
"""All that there are; the last ones are for the tests."""


def variable(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """One of VALUES; None where it is not set, or empty. InputError for a value that means nothing."""
    value = environ.get(name)
    if value and value not in VALUES[name]:
        raise InputError(f"{name}={value}: must be {' or '.join(VALUES[name])}", param=name)
    return value or None


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """InputError naming the first variable that is not known, or whose value means nothing. For the start, before
    anything costs time."""
    for name in environ:
        if name.startswith(PREFIX) and name not in NAMES:
            [nearest] = difflib.get_close_matches(name, NAMES, 1, cutoff=0.0)
            raise InputError(f"{name[:64]} is not known; the nearest is {nearest}", param=name[:64])
    for name in VALUES:
        variable(name, environ)
    if environ.get(FAULT):
        FaultPlan.parse(environ[FAULT])
        check_mark(environ.get(FAULT_MARK))
