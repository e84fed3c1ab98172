"""`torch.compile` of the device of `simcuda`: nothing is compiled, and what runs is told that it is, by thread."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

_told = threading.local()
_is_compiling = torch.compiler.is_compiling


def _compile(run: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        before, _told.here = getattr(_told, "here", False), True
        try:
            return run(*args, **kwargs)
        finally:
            _told.here = before

    return call


def _is_told() -> bool:
    return getattr(_told, "here", False) or _is_compiling()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    with (
        mock.patch.object(torch, "compile", _compile),
        mock.patch.object(torch.compiler, "is_compiling", _is_told),
    ):
        yield
