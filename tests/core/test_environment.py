"""What the environment variables may be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen3vl_disagg.core.environment import NAMES, check_environment, variable
from qwen3vl_disagg.core.errors import InputError


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"Q3VL_KERNELS": "", "Q3VL_GRAPHS": "", "Q3VL_FAULT": ""},
        {"Q3VL_KERNELS": "on", "Q3VL_GRAPHS": "count", "Q3VL_FAULT": "encoded:1:kill", "Q3VL_FAULT_MARK": "/tmp/mark"},
        {"Q3VL_KERNELS": "off", "Q3VL_GRAPHS": "fail", "Q3VL_FAULT": "last-row:12:raise"},
        {"Q3VL_FAULT": "in-tower:@0123abcd:kill"},
    ],
)
def test_what_means_something(environ):
    check_environment(environ)
    assert variable("Q3VL_KERNELS", environ) == (environ.get("Q3VL_KERNELS") or None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *[("Q3VL_KERNELS", value, "on or off") for value in ("Off", "0", "false", " off", "auto")],
        *[("Q3VL_GRAPHS", value, "count or fail") for value in ("on", "1", "Fail")],
        *[
            ("Q3VL_FAULT", f"encoded:{nth}:kill", "nth from 1 on")
            for nth in ("0", "-1", "", "1.0", "²", "9" * 5000, "٣")
        ],
        *[("Q3VL_FAULT", value, "kill|stop|raise") for value in ("encoded", "encoded:1", "encoded:1:die", "no:1:kill")],
        ("Q3VL_FAULT", "encoded:1:kill:2", "kill|stop|raise"),
        *[
            ("Q3VL_FAULT", f"{where}:kill", "kill|stop|raise")
            for where in ("encoded:@0123abcd", "in-tower:@0123", "in-tower:@X")
        ],
    ],
)
def test_what_means_nothing_is_refused_by_name(name, value, words):
    with pytest.raises(InputError) as caught:
        check_environment({name: value})
    assert caught.value.param == name
    assert str(caught.value).startswith(f"{name}={value[:20]}")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "nearest"), [("Q3VL_KERNEL", "Q3VL_KERNELS"), ("Q3VL_GRAPH", "Q3VL_GRAPHS"), ("Q3VL_", "Q3VL_")]
)
def test_a_name_that_is_not_known_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(InputError, match=f"{name} is not known; the nearest is {nearest}") as caught:
        check_environment({"Q3VL_KERNELS": "on", name: ""})
    assert caught.value.param == name


def test_all_names_of_the_tree_are_known():
    """Those that are written out in code or on a page."""
    root = Path(__file__).parent.parent.parent
    files = [path for folder in ("qwen3vl_disagg", "recipes", "tools", "docs") for path in (root / folder).rglob("*")]
    texts = [path.read_text() for path in [*files, *root.glob("*.md")] if path.suffix in (".py", ".md")]
    assert {name for text in texts for name in re.findall(r"\bQ3VL_[A-Z_]*[A-Z]\b", text)} <= {*NAMES}


def test_the_mark_of_a_fault_can_be_made(tmp_path):
    with pytest.raises(InputError, match="folder does not exist"):
        check_environment({"Q3VL_FAULT": "encoded:1:kill", "Q3VL_FAULT_MARK": str(tmp_path / "no" / "mark")})
