"""How the checkpoint wants to be sampled, and what a request may change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.core.requests import SamplingParams

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


MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_BIASES = 1024
_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What generation_config.json may set."""


def check_number(name: str, value: Any, *, param: str | None = None) -> Any:
    """The value, if LIMITS allows it; InputError naming the bounds otherwise."""
    low, high, whole = LIMITS[name]
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{param or name} must be {kind} from {low:g} to {high:g}", param=param or name)
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
        if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not math.isfinite(bias):
            raise InputError(f"logit_bias of token {text} must be a number", param="logit_bias")
        found[int(text)] = float(bias)
    return found


@dataclass(frozen=True)
class GenerationDefaults:
    """The values of generation_config.json; greedy when it asks for no sampling (a repetition penalty stays)."""

    eos_token_ids: frozenset[int]
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_folder(cls, folder: Path, *, default_eos: int) -> GenerationDefaults:
        """Read generation_config.json; without the file: greedy, ending with `default_eos`."""
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls(frozenset({default_eos}))
        try:
            raw = parse_json(path.read_bytes())
            eos = raw.get("eos_token_id", default_eos)
            values = {name: raw[name] for name in _OWN if raw.get(name) is not None}
            for name, value in values.items():
                check_number(name, value)
            eos_ids = frozenset(map(int, eos if isinstance(eos, list) else [eos]))
            return cls(eos_ids, do_sample=bool(raw.get("do_sample", False)), **values)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(folder, [f"generation_config.json: {error}"]) from error

    def sampling(
        self,
        *,
        max_new_tokens: int = 128,
        min_tokens: int = 0,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        cache_salt: str = "",
    ) -> SamplingParams:
        """Sampling parameters: what is given, else the checkpoint's own. InputError for a value out of bounds."""
        own_temperature = self.temperature if self.do_sample else 0.0
        values: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "min_tokens": min_tokens,
            "temperature": own_temperature if temperature is None else temperature,
            "top_p": self.top_p if top_p is None else top_p,
            "top_k": self.top_k if top_k is None else top_k,
            "min_p": self.min_p if min_p is None else min_p,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "repetition_penalty": self.repetition_penalty if repetition_penalty is None else repetition_penalty,
            "seed": seed,
            "logprobs": logprobs,
        }
        for name, value in values.items():
            if value is not None:
                check_number(name, value)
        if min_tokens > max_new_tokens:
            raise InputError(f"min_tokens is {min_tokens}, but only {max_new_tokens} may come", param="min_tokens")
        return SamplingParams(
            ignore_eos=ignore_eos,
            cache_salt=cache_salt,
            stop=check_stop(list(stop)),
            logit_bias=check_logit_bias(dict(logit_bias or {})),
            **values,
        )
