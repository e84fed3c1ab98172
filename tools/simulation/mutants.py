"""Bugs planted by name, to show that the simulator would notice them. Each is a small change to production code, undone
at the end; those that change what the simulator itself models are marked, and show only that a check can fire."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

INVARIANTS = (*(f"I{number}" for number in range(1, 18)), "wire", "raised")
"""What a violation can name: those of the protocol; that only typed frames cross a border; that a machine raised."""


@dataclass(frozen=True)
class Mutant:
    """`fires`: the invariant that must notice it; another one does not count. `stands_for`: the failure of others (F1
    to F13, in the order of docs/simulation.md) that this is, if it is one. `is_of_simulator`: it changes a part of the
    simulator that stands where production has threads and tensors."""

    name: str
    fires: str
    about: str
    patch: Callable[[], Iterator[None]]
    stands_for: str = ""
    is_of_simulator: bool = False


MUTANTS: dict[str, Mutant] = {}


def mutant(
    name: str, fires: str, about: str, *, stands_for: str = "", is_of_simulator: bool = False
) -> Callable[[Callable[[], Iterator[None]]], None]:
    """Register a generator that plants a bug, yields, and undoes it. ValueError for an invariant that does not exist,
    or a name that is taken."""
    if fires not in INVARIANTS or name in MUTANTS:
        raise ValueError(f"{name}: {fires} is no invariant, or the name is taken")

    def add(patch: Callable[[], Iterator[None]]) -> None:
        MUTANTS[name] = Mutant(name, fires, about, patch, stands_for, is_of_simulator)

    return add


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Run with a bug, or without one."""
    if name is None:
        yield
        return
    with contextlib.contextmanager(MUTANTS[name].patch)():
        yield


@contextlib.contextmanager
def swap(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace a function or property of a class or module for a while.

    TypeError when the new one is not called as the old one is: a bug that fails in its own call shows nothing.
    """
    original = owner.__dict__[name]
    expected, got = _parameters(original), _parameters(value)
    if expected != got:
        raise TypeError(f"{owner.__name__}.{name} takes {expected}, what replaces it takes {got}")
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _parameters(value: Any) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults; annotations do not matter."""
    function: Any = value.fget if isinstance(value, property) else value
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def method(owner: type, name: str) -> Callable[..., Any]:
    """A class's own function, unbound."""
    return owner.__dict__[name]
