"""The benchmark of grammars, with a tiny model."""

from __future__ import annotations

import json

import pytest

from tools.bench_grammars import grammars


def test_engines_take_turns_and_are_compared_with_the_first(capsys):
    grammars(preset="tiny-random", batch=3, bound=(0, 2), steps=4, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert (result["bench"], result["batch"], result["steps"]) == ("grammars", 3, 4)
    free, bound = result["results"]
    assert (free["bound"], bound["bound"]) == (0, 2)
    assert free["ratio"] == 1.0
    assert bound["wall_ms"] > 0


@pytest.mark.parametrize("wrong", [{"bound": (0, 9)}, {"bound": ()}, {"steps": 0}])
def test_wrong_numbers(wrong):
    with pytest.raises(SystemExit, match="--bound"):
        grammars(preset="tiny-random", **wrong)
