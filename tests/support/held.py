"""What is held, by name: the sizes of all containers that objects of ours reach, and how many of those objects there
are. Two looks with work between them say what grew.

A path collapses keys and numbers: `hub._ranks` is the dict, `hub._ranks[]._watch` an attribute of all its values
together. So a rank with another number is found in the same place.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Set
from types import FunctionType, MethodType, ModuleType
from typing import Any

from msgspec import Struct

OURS = "qwen3vl_disagg"
_ATOMS = (str, bytes, bytearray, int, float, complex, bool, type(None), type, range, memoryview, FunctionType)
_Step = tuple[str, Any]


def held(**roots: object) -> Counter[str]:
    """Path -> entries of the containers there; the roots' names begin the paths."""
    sizes, seen = Counter[str](), set[int]()
    todo: deque[_Step] = deque(roots.items())
    alive: list[object] = []  # what is made on the way must not give its number to another one
    while todo:
        path, one = todo.popleft()
        if isinstance(one, _ATOMS) or id(one) in seen:
            continue
        seen.add(id(one))
        alive.append(one)
        if isinstance(one, (Mapping, list, Set, deque)):
            sizes[path] += len(one)
        todo.extend(_next(path, one))
    return +sizes


def _next(path: str, one: Any) -> Iterator[_Step]:
    """What is reached from there in one step."""
    if isinstance(one, Mapping):
        yield from ((f"{path}[]", value) for value in list(one.values()))
    elif isinstance(one, (list, Set, deque, tuple)):
        yield from ((f"{path}[]", value) for value in list(one))
    elif isinstance(one, functools.partial):
        yield f"{path}()", [one.func, *one.args, *one.keywords.values()]
    elif isinstance(one, MethodType):
        yield path, one.__self__
    elif isinstance(one, functools._lru_cache_wrapper):
        if one.cache_info().maxsize is None:  # the others are bounded
            yield f"{path} (cache)", [None] * one.cache_info().currsize
    elif _is_walked(one):
        yield from ((f"{path}.{name}", value) for name, value in _attributes(one))


def _is_walked(one: Any) -> bool:
    """Ours, and queues: what other packages keep is theirs."""
    module = str(type(one).__module__)
    return module.split(".")[0] in (OURS, "queue") or module == "asyncio.queues"


def _attributes(one: Any) -> Iterator[tuple[str, Any]]:
    names = dict.fromkeys(vars(one)) if hasattr(one, "__dict__") else {}
    if isinstance(one, Struct):
        names |= dict.fromkeys(one.__struct_fields__)
    for kind in type(one).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names |= dict.fromkeys([slots] if isinstance(slots, str) else slots)
    for name in names:
        if name not in ("__dict__", "__weakref__"):
            try:
                yield name, getattr(one, name)
            except AttributeError:  # a slot that has no value yet
                continue


def modules() -> dict[str, object]:
    """All that the package's modules hold themselves: caches, registries, rings."""
    found: dict[str, object] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == OURS and isinstance(module, ModuleType):
            for key, value in vars(module).items():
                is_cache = isinstance(value, functools._lru_cache_wrapper) and value.__module__ == name
                is_held = is_cache or isinstance(value, (dict, list, set, deque)) or _is_walked(value)
                if is_held and not key.startswith("__"):
                    found[f"{name.removeprefix(OURS + '.')}.{key}"] = value
    return found


def instances() -> Counter[str]:
    """How many objects of each class of ours the collector knows, however they are reached."""
    gc.collect()
    kinds = Counter(type(one) for one in gc.get_objects())
    ours = {kind: count for kind, count in kinds.items() if str(kind.__module__).startswith(OURS)}
    return Counter({f"{kind.__module__}.{kind.__qualname__}": count for kind, count in ours.items()})


def of_process() -> dict[str, int]:
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


def look(**roots: object) -> Counter[str]:
    """All of the above."""
    return held(**roots, **modules()) + instances() + Counter(of_process())


def grown(
    before: Mapping[str, int], after: Mapping[str, int], bounded: Mapping[str, int] | None = None, slack: int = 0
) -> list[str]:
    """What holds more than before, a line each, by more than `slack`. `bounded`: what may grow, by the beginning of its
    name, and how far."""
    lines = []
    for name, count in sorted(after.items()):
        allowed = [most for start, most in (bounded or {}).items() if name.startswith(start)]
        if count > max([before.get(name, 0) + slack, *allowed]):
            lines.append(f"{name}: {before.get(name, 0)} -> {count}")
    return lines


def names_of(lines: Iterable[str]) -> list[str]:
    return [line.partition(": ")[0] for line in lines]
