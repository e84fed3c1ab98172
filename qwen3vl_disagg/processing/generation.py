"""How the checkpoint wants to be sampled, and what a request may change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import CheckpointError, InputError
from qwen3vl_disagg.core.requests import SamplingParams

# name -> (lowest, highest, whole numbers only)
LIMITS: dict[str, tuple[float, float, bool]] = {
    "max_new_tokens": (1, 2**20, True),
    "temperature": (0, 100, False),
    "top_p": (1e-6, 1, False),
    "top_k": (0, 2**20, True),
    "seed": (0, 2**63 - 1, True),
    "logprobs": (0, 20, True),
}


def check_number(name: str, value: Any, *, param: str | None = None) -> Any:
    """The value, if LIMITS allows it; InputError naming the bounds otherwise."""
    low, high, whole = LIMITS[name]
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{param or name} must be {kind} from {low:g} to {high:g}", param=param or name)
    return value


@dataclass(frozen=True)
class GenerationDefaults:
    """The values of generation_config.json; greedy when it asks for no sampling."""

    eos_token_ids: frozenset[int]
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def from_folder(cls, folder: Path, *, default_eos: int) -> GenerationDefaults:
        """Read generation_config.json; without the file: greedy, ending with `default_eos`."""
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls(frozenset({default_eos}))
        try:
            raw = json.loads(path.read_bytes())
            eos = raw.get("eos_token_id", default_eos)
            values = {name: raw[name] for name in ("temperature", "top_p", "top_k") if raw.get(name) is not None}
            for name, value in values.items():
                check_number(name, value)
            eos_ids = frozenset(map(int, eos if isinstance(eos, list) else [eos]))
            return cls(eos_ids, do_sample=bool(raw.get("do_sample", False)), **values)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(folder, [f"generation_config.json: {error}"]) from error

    def sampling(
        self,
        *,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
    ) -> SamplingParams:
        """Sampling parameters: what is given, else the checkpoint's own. InputError for a value out of bounds."""
        own_temperature = self.temperature if self.do_sample else 0.0
        values: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": own_temperature if temperature is None else temperature,
            "top_p": self.top_p if top_p is None else top_p,
            "top_k": self.top_k if top_k is None else top_k,
            "seed": seed,
            "logprobs": logprobs,
        }
        for name, value in values.items():
            if value is not None:
                check_number(name, value)
        return SamplingParams(ignore_eos=ignore_eos, **values)
