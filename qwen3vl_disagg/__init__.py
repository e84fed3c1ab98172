"""Qwen3-VL-MoE served with the vision encoder apart from the language model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3vl_disagg.llm.llm import LLM

__all__ = ["LLM"]


# torch's threads meet at the end of each loop, and whoever comes first spins, by default for some 16 ms. Where another
# program has the core of the last one, all of that is lost. So: about 0.1 ms, then they sleep. Read once, when
# torch is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "2000"


def __getattr__(name: str) -> Any:
    # Imported on first use, so that a light command does not pay for the engine.
    if name == "LLM":
        from qwen3vl_disagg.llm.llm import LLM

        return LLM
    raise AttributeError(name)
