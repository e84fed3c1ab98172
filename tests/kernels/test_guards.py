"""What a kernel was not made for does not reach it: an error that says what was given, and no address is touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen3vl_disagg.kernels import int8, ops
from qwen3vl_disagg.model.kernels import use_kernels
from tests.support.engine import make_engine
from tests.support.random_model import random_language_model, small_config

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not ops.is_cpu_bf16(torch.zeros(1, dtype=BF16)), reason="no kernels here")


def b(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=BF16)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def gaps(x: torch.Tensor) -> torch.Tensor:
    """The same, not in one piece."""
    return torch.stack([x, x], dim=-1)[..., 0]


def decode(size=64, heads=4, kv=2, **changed):
    args = {
        "q": b(2, heads, size),
        "k": b(2, kv, size),
        "v": b(2, kv, size),
        "k_pool": b(16, kv, size),
        "v_pool": b(16, kv, size),
        "tables": ints(2, 1),
        "contexts": ints(2) + 1,
        "slots": torch.tensor([0, 1]),
    }
    return lambda: ops.decode_attention(*{**args, **changed}.values(), 4)


def prefill(size=64, new=2, length=3, **changed):
    args = {"q": b(new, 4, size), "k": b(16, 2, size), "v": b(16, 2, size), "slots": ints(length)}
    return lambda: ops.prefill_attention(*{**args, **changed}.values())


def experts(**changed):
    args = {"x": b(3, 64), "weights": b(3, 2), "ids": ints(3, 2), "gate_up": b(2, 64, 64), "down": b(2, 64, 32)}
    return lambda: ops.experts(*{**args, **changed}.values())


def experts_int8(**changed):
    args = {"x": b(3, 64), "weights": b(3, 2), "ids": ints(3, 2)}
    args |= {"gate_up": b(2, 64, 64).char(), "gate_up_scale": torch.ones(2, 64)}
    args |= {"down": b(2, 64, 32).char(), "down_scale": torch.ones(2, 64)}
    return lambda: torch.ops.q3vl.experts_int8(*{**args, **changed}.values())


CASES = {
    "swiglu: widths of 24": lambda: ops.swiglu(b(2, 24), b(2, 24)),
    "swiglu: float32": lambda: ops.swiglu(b(2, 32), b(2, 32).float()),
    "swiglu: another shape": lambda: ops.swiglu(b(2, 32), b(3, 32)),
    "decode: heads of 32": decode(size=32),
    "decode: heads of 12": decode(size=12),
    "decode: heads of 192": decode(size=192),
    "decode: a group of 17": decode(heads=34),
    "decode: no whole groups": decode(heads=3),
    "decode: float32 queries": decode(q=b(2, 4, 64).float()),
    "decode: float16 keys": decode(k=b(2, 2, 64).half()),
    "decode: float32 pages": decode(k_pool=b(16, 2, 64).float()),
    "decode: pages of other heads": decode(v_pool=b(16, 1, 64)),
    "decode: pages with gaps": decode(k_pool=gaps(b(16, 2, 64))),
    "decode: int32 tables": decode(tables=ints(2, 1).int()),
    "decode: fewer slots than sequences": decode(slots=ints(1)),
    "decode: another device": decode(q=b(2, 4, 64).to("meta")),
    "prefill: heads of 80": prefill(size=80),
    "prefill: more queries than tokens": prefill(new=4),
    "prefill: float32 queries": prefill(q=b(2, 4, 64).float()),
    "prefill: float32 pages": prefill(v=b(16, 2, 64).float()),
    "prefill: int32 slots": prefill(slots=ints(3).int()),
    "frames: heads of 72": lambda: ops.full_attention(b(4, 2, 72), b(4, 2, 72), b(4, 2, 72), [4]),
    "frames: rows that are not there": lambda: ops.full_attention(b(4, 2, 64), b(4, 2, 64), b(4, 2, 64), [8]),
    "frames: float32": lambda: ops.full_attention(*[b(4, 2, 64).float()] * 3, [4]),
    "frames: no heads in one piece": lambda: ops.rotate_(gaps(b(4, 2, 64)), *[torch.ones(4, 1, 64)] * 2),
    "frames: bfloat16 angles": lambda: ops.rotate_(b(4, 2, 64), *[b(4, 1, 64)] * 2),
    "frames: fewer angles": lambda: ops.rotate_(b(4, 2, 64), *[torch.ones(3, 1, 64)] * 2),
    "frames: heads of 72, rotated": lambda: ops.rotate_(b(4, 2, 72), *[torch.ones(4, 1, 72)] * 2),
    "gelu: float32": lambda: ops.gelu_tanh_(b(64).float()),
    "gelu: with gaps": lambda: ops.gelu_tanh_(gaps(b(64))),
    "linear: float32 rows": lambda: ops.linear(b(2, 64).float(), [b(8, 64)]),
    "linear: float32 weight": lambda: ops.linear(b(2, 64), [b(8, 64).float()]),
    "linear: another depth": lambda: ops.linear(b(2, 64), [b(8, 96)]),
    "linear: a depth of 40": lambda: ops.linear(b(2, 40), [b(8, 40)]),
    "linear: 6 outputs": lambda: ops.linear(b(2, 64), [b(6, 64)]),
    "linear: 65 rows": lambda: ops.linear(b(65, 64), [b(8, 64)]),
    "linear: 5 weights": lambda: ops.linear(b(2, 64), [b(8, 64)] * 5),
    "linear: a weight with gaps": lambda: ops.linear(b(2, 64), [gaps(b(8, 64))]),
    "linear: 3 dims": lambda: ops.linear(b(1, 2, 64), [b(8, 64)]),
    "many rows: float32 rows": lambda: ops.many_rows(b(80, 64).float(), [b(64, 64)]),
    "many rows: another depth": lambda: ops.many_rows(b(80, 64), [b(64, 96)]),
    "many rows: a depth of 40": lambda: ops.many_rows(b(80, 40), [b(64, 40)]),
    "many rows: 24 outputs": lambda: ops.many_rows(b(80, 64), [b(24, 64)]),
    "many rows: 5 weights": lambda: ops.many_rows(b(80, 64), [b(64, 64)] * 5),
    "many rows: none": lambda: ops.many_rows(b(80, 64), []),
    "many rows: a weight of none": lambda: ops.many_rows(b(80, 64), [b(64, 64), b(0, 64)]),
    "many rows: no depth": lambda: ops.many_rows(b(80, 0), [b(64, 0)]),
    "many rows: a weight with gaps": lambda: ops.many_rows(b(80, 64), [gaps(b(64, 64))]),
    "many rows: a shorter bias": lambda: ops.many_rows(b(80, 64), [b(64, 64)], b(32)),
    "many rows: a float32 bias": lambda: ops.many_rows(b(80, 64), [b(64, 64)], b(64).float()),
    "many rows: 3 dims": lambda: ops.many_rows(b(1, 80, 64), [b(64, 64)]),
    "experts: float32 rows": experts(x=b(3, 64).float()),
    "experts: float32 weights": experts(weights=b(3, 2).float()),
    "experts: int32 ids": experts(ids=ints(3, 2).int()),
    "experts: other sizes": experts(down=b(2, 64, 64)),
    "experts: a width of 24": experts(gate_up=b(2, 48, 64), down=b(2, 64, 24)),
    "experts: with gaps": experts(down=gaps(b(2, 64, 32))),
    "norm: float32": lambda: ops.rms_norm(b(2, 64).float(), b(64), 1e-6),
    "norm: another size": lambda: ops.rms_norm(b(2, 64), b(32), 1e-6),
    "norm of a sum: another size": lambda: ops.add_rms_norm(b(2, 64), b(2, 64), b(32), 1e-6),
    "norm of a sum: fewer rows": lambda: ops.add_rms_norm(b(2, 64), b(1, 64), b(64), 1e-6),
    "norm of a sum: float32": lambda: ops.add_rms_norm(b(2, 64), b(2, 64).float(), b(64), 1e-6),
    "norm: a size of 40": lambda: ops.rms_norm(b(2, 40), b(40), 1e-6),
    "rotary: float32 angles": lambda: ops.norm_rotary(b(2, 2, 64), b(64), 1e-6, *[torch.ones(2, 1, 64)] * 2),
    "rotary: fewer angles": lambda: ops.norm_rotary(b(2, 2, 64), b(64), 1e-6, *[b(1, 1, 64)] * 2),
    "int8: float32 rows": lambda: torch.ops.q3vl.linear_int8(b(2, 64).float(), b(8, 64).char(), torch.ones(8)),
    "int8: bfloat16 weights": lambda: torch.ops.q3vl.linear_int8(b(2, 64), b(8, 64), torch.ones(8)),
    "int8: bfloat16 scales": lambda: torch.ops.q3vl.linear_int8(b(2, 64), b(8, 64).char(), b(8)),
    "int8: fewer scales": lambda: torch.ops.q3vl.linear_int8(b(2, 64), b(8, 64).char(), torch.ones(4)),
    "int8: 65 rows": lambda: torch.ops.q3vl.linear_int8(b(65, 64), b(8, 64).char(), torch.ones(8)),
    "int8 experts: float32 rows": experts_int8(x=b(3, 64).float()),
    "int8 experts: bfloat16 scales": experts_int8(down_scale=b(2, 64)),
    "int8 experts: fewer scales": experts_int8(gate_up_scale=torch.ones(2, 32)),
}


@pytest.mark.parametrize("call", CASES.values(), ids=CASES)
def test_refused(call):
    with pytest.raises(ValueError, match="the CPU kernels take"):
        call()


def test_what_they_are_made_for_passes():
    for call in (decode(), decode(size=128), prefill(), experts(), experts_int8()):
        assert call().isfinite().all()


def test_ids_that_are_no_experts_add_nothing():
    """Also those below 0, which would be an address before the table."""
    args = b(1, 64), b(1, 2)
    for ids in ([[-1, -(2**40)]], [[2, 2**40]]):
        assert not ops.experts(*args, torch.tensor(ids), b(2, 64, 64), b(2, 64, 32)).any()


def test_an_engine_with_other_heads_refuses_the_kernel_at_the_start():
    model = use_kernels(random_language_model(small_config(), seed=0).to(BF16))
    with pytest.raises(ValueError, match=r"heads of \(64, 128\), not 12"):
        make_engine(model, attention="kernel")


def test_a_model_that_is_cast_after_loading_does_not_answer_nonsense():
    config = small_config()
    config = replace(config, text=replace(config.text, head_dim=64, mrope_section=(12, 10, 10)))
    model = use_kernels(random_language_model(config, seed=0).to(BF16))
    ids = torch.arange(3)
    norm = model.model.layers[0].input_layernorm
    with pytest.raises(ValueError, match="the CPU kernels take"):
        norm.float()(model.model.embed_tokens(ids).float())
    assert int8.can_linear_int8(b(8, 64).char(), BF16)
