"""Cases of a test with several parameters: any two values meet in the default run, all combinations in the slow one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def spread(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """All combinations. Those that bring no two values together which have not met before are marked `slow`."""
    names, todo = list(axes), list(product(*axes.values()))
    met: set[tuple[int, int, str, str]] = set()

    def meetings(case: tuple[Any, ...]) -> set[tuple[int, int, str, str]]:
        return {(i, j, repr(case[i]), repr(case[j])) for i, j in combinations(range(len(case)), 2)}

    cases = []
    while todo:
        case = max(todo, key=lambda one: len(meetings(one) - met))
        todo.remove(case)
        marks = [] if meetings(case) - met else [pytest.mark.slow]
        met |= meetings(case)
        cases.append(pytest.param(*case, marks=marks))
    return pytest.mark.parametrize(names, cases)
