"""Qwen3-VL-MoE served with the vision encoder apart from the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3vl_disagg.llm.llm import LLM

__all__ = ["LLM"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that a light command does not pay for the engine.
    if name == "LLM":
        from qwen3vl_disagg.llm.llm import LLM

        return LLM
    raise AttributeError(name)
