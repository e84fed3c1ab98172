"""What the environment variables may be."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.core.environment import check_environment, variable
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


def test_the_mark_of_a_fault_can_be_made(tmp_path):
    with pytest.raises(InputError, match="folder does not exist"):
        check_environment({"Q3VL_FAULT": "encoded:1:kill", "Q3VL_FAULT_MARK": str(tmp_path / "no" / "mark")})
