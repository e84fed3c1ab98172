"""How the checkpoint wants to be sampled, and what a request may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.sampling_bounds import LIMITS, check_number

_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What generation_config.json may set."""


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
        max_new_tokens: int | None = None,
        is_open_ended: bool = False,
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
        """Sampling parameters: what is given, else the checkpoint's own. InputError for a value out of bounds.

        Without `max_new_tokens` an answer may take what is left of the context.
        """
        if max_new_tokens is None:
            max_new_tokens, is_open_ended = int(LIMITS["max_new_tokens"][1]), True
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
        biases = dict(logit_bias or {})
        return SamplingParams(
            is_open_ended=is_open_ended,
            ignore_eos=ignore_eos,
            cache_salt=cache_salt,
            stop=list(stop),
            logit_bias=biases,
            **values,
        )
