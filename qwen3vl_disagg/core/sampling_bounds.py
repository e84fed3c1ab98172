"""What sampling parameters may be, wherever they come from: the command line, HTTP or Python."""

from __future__ import annotations

import sys
from typing import Any

from qwen3vl_disagg.core.errors import InputError

# name -> (lowest, highest, whole numbers only)
LIMITS: dict[str, tuple[float, float, bool]] = {
    "max_new_tokens": (1, 2**20, True),
    "min_tokens": (0, 2**20, True),
    "temperature": (0, 100, False),
    "top_p": (1e-6, 1, False),
    "top_k": (0, 2**20, True),
    "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (1e-3, 1e3, False),
    "seed": (0, 2**63 - 1, True),
    "logprobs": (0, 20, True),
}
NOT_GIVEN = ("seed", "logprobs")
"""What may be None."""
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_BIASES = 1024
_LARGEST = sys.float_info.max


def check_number(name: str, value: Any, *, param: str | None = None) -> Any:
    """The value, if LIMITS allows it; InputError naming the bounds otherwise."""
    return check_within(value, *LIMITS[name], param or name)


def check_within(value: Any, low: float, high: float, whole: bool, param: str) -> Any:
    """The value, if it is a number within these bounds; InputError naming them otherwise."""
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or not low <= value <= high:
        bounds = f"a whole number from {int(low)} to {int(high)}" if whole else f"a number from {low:g} to {high:g}"
        raise InputError(f"{param} must be {bounds}", param=param)
    return value


def check_stop(value: Any) -> list[str]:
    """One stop string or several. InputError if there are too many, or one is empty or too long."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise InputError("stop must be a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InputError(f"stop takes up to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters", param="stop")
    return list(stops)


def check_logit_bias(value: Any) -> dict[int, float]:
    """Token id (JSON: a string of digits) -> bias; the sampler clamps to -100..100. InputError for anything else."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise InputError(f"logit_bias must be an object of up to {MAX_BIASES} token ids", param="logit_bias")
    found: dict[int, float] = {}
    for key, bias in value.items():
        text = str(key)
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise InputError(f"logit_bias takes token ids, not {text[:32]!r}", param="logit_bias")
        if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not -_LARGEST <= bias <= _LARGEST:
            raise InputError(f"logit_bias of token {text} must be a finite number", param="logit_bias")
        found[int(text)] = float(bias)
    return found
