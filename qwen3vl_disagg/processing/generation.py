"""How the checkpoint wants to be sampled, and what a request may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.core.json_text import parse_json
from qwen3vl_disagg.core.sampling_params import MAX_NEW_TOKENS, OPTIONS, SamplingParams


@dataclass(frozen=True)
class GenerationDefaults:
    """The values of generation_config.json; greedy when it asks for no sampling (a repetition penalty stays)."""

    eos_token_ids: frozenset[int]
    do_sample: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)
    """Option -> its value, of those it gives."""

    @classmethod
    def from_folder(cls, folder: Path, *, default_eos: int) -> GenerationDefaults:
        """Read generation_config.json; without the file: greedy, ending with `default_eos`."""
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls(frozenset({default_eos}))
        try:
            raw = parse_json(path.read_bytes())
            eos = raw.get("eos_token_id", default_eos)
            given = [name for name, option in OPTIONS.items() if option.is_checkpoints and raw.get(name) is not None]
            own = {name: OPTIONS[name].kind.check(raw[name], name) for name in given}
            eos_ids = frozenset(map(int, eos if isinstance(eos, list) else [eos]))
            return cls(eos_ids, bool(raw.get("do_sample", False)), own)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(folder, [f"generation_config.json: {error}"]) from error

    def sampling(self, *, max_new_tokens: int | None = None, **given: Any) -> SamplingParams:
        """Sampling parameters, by the names of `SamplingParams`: what is given and not None, else the checkpoint's own.

        Without `max_new_tokens` an answer may take what is left of the context. InputError for a value out of bounds.
        """
        values = {"temperature": 1.0, **self.own}
        if not self.do_sample:
            values["temperature"] = 0.0
        if max_new_tokens is None:
            values |= {"max_new_tokens": MAX_NEW_TOKENS, "is_open_ended": True}
        else:
            values["max_new_tokens"] = max_new_tokens
        return SamplingParams(**values | {name: value for name, value in given.items() if value is not None})
