"""Bugs planted by name, to show that the simulator would notice them. Each is a small change to a production class,
undone at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """`covers`: the invariants, or the failures of others (F1 to F13, in the order of docs/simulation.md), that this
    bug stands for."""

    name: str
    covers: str
    about: str
    patch: Callable[[], Iterator[None]]


MUTANTS: dict[str, Mutant] = {}


def mutant(name: str, covers: str, about: str) -> Callable[[Callable[[], Iterator[None]]], None]:
    """Register a generator that plants a bug, yields, and undoes it."""

    def add(patch: Callable[[], Iterator[None]]) -> None:
        MUTANTS[name] = Mutant(name, covers, about, patch)

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
    """Replace an attribute of a class or module for a while."""
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def method(owner: type, name: str) -> Callable[..., Any]:
    """A class's own function, unbound."""
    return owner.__dict__[name]
