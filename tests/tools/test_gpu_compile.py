"""What compiles for a GPU without one: kernels fit in its shared memory, and how many a layer launches."""

from __future__ import annotations

import importlib.util

import pytest

from tools.gpu_compile import command

HAS_TRITON = importlib.util.find_spec("triton") is not None
OURS = ("_route", "_order", "_pick", "_swiglu", "_combine", "_up", "_down")


def test_a_table_of_launches():
    def made(launches, shared):
        return {"model": "m", "step": "8", "num_launches": launches, "shared": shared, "shared_name": "k"}

    text = command.table([made(35, 100)], [made(20, 2048)])
    assert text.splitlines()[-1] == "| m | 8 | 35 | 20 | 2.0 KiB | `k` |"


def test_a_child_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(command.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="no-model"):
        command.compiled("no-model", has_kernels=True)


@pytest.mark.acceptance
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: it is what compiles")
@pytest.mark.parametrize("model", ["30b-a3b", "235b-a22b/8"])
def test_a_layer_compiles_for_sm_90_and_launches_less_with_our_kernels(model):
    before, after = (command.compiled(model, has_kernels=has_kernels) for has_kernels in (False, True))
    assert [made["step"] for made in before] == [made["step"] for made in after]
    assert sum(made["compiled"] for made in after) > 20
    for old, new in zip(before, after, strict=True):
        assert 0 < max(old["shared"], new["shared"]) <= 227 * 1024
        assert new["num_launches"] <= old["num_launches"] - 6, new["step"]
        assert not set(launched(old)) & set(OURS)
    few, many = after[0], after[-1]
    assert {"_route", "_up", "_down"} <= set(launched(few))
    assert {"_route", "_order", "_pick", "_swiglu", "_combine"} <= set(launched(many))


def launched(made) -> list[str]:
    return [name.removeprefix("triton ") for name in made["launches"]]
