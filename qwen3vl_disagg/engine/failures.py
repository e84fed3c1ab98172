"""What can go wrong in a step, besides a request that is wrong by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qwen3vl_disagg.core.devices import raise_if_lost
from qwen3vl_disagg.engine.runner import BadRows
from qwen3vl_disagg.model.moe import DispatchPlan


class NotFinite(ArithmeticError):
    """The model's numbers for a sequence are NaN or infinite."""


class StepFailed(BaseException):
    """The model failed in a step that other ranks take part in: they are left waiting. No failure of single requests,
    so nothing that handles these may catch it."""


@contextmanager
def fatal_where(dispatch: DispatchPlan | None) -> Iterator[None]:
    """Failures of the model, but not of rows that were looked at before it ran, where others take part."""
    try:
        yield
    except BadRows:
        raise
    except Exception as error:
        if dispatch is None:
            raise
        raise_if_lost(error)
        raise StepFailed(f"{type(error).__name__} in a step that is taken with other ranks") from error
