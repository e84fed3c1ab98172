"""What is compiled: a layer of a published model at each of the decoder's graphs, and FlexAttention behind it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen3vl_disagg.engine.compiled import CompiledDecoder
from qwen3vl_disagg.model import (
    ModelConfig,
    PagedBatch,
    Qwen3MoeForCausalLMWithDeepStack,
    TextConfig,
    flex,
    use_kernels,
)
from qwen3vl_disagg.model.deepstack import Qwen3MoeModelWithDeepStack
from qwen3vl_disagg.model.moe import SparseMoe
from qwen3vl_disagg.model.rope import text_rotary
from qwen3vl_disagg.plan.presets import PRESETS
from tools.gpu_compile.pretend import MODE, SEEN, as_fake, fake, is_fake

KERNELS_OF = {"aten::_grouped_mm": 2, "aten::topk": 2, "aten::sort": 4, "aten::argsort": 4}
"""Operators that launch more than one kernel, by PyTorch's sources; all others are taken for one."""
VIEWS = {
    *("view", "slice", "select", "as_strided", "t", "transpose", "unsqueeze", "squeeze", "expand", "permute", "detach"),
    *("alias", "split", "split_with_sizes", "_unsafe_view", "_reshape_alias", "unbind", "unflatten", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "sym_size"),
}
"""Operators that launch nothing."""
PAGE, PAGES = 64, 256


@dataclass(frozen=True)
class Step:
    """New tokens of each sequence, and the length of each with them."""

    name: str
    new: tuple[int, ...]
    contexts: tuple[int, ...]
    has_level: bool = False


STEPS = (
    Step("1", (1,), (700,)),
    Step("8", (1,) * 8, (700, 3, 40, 900, 16, 17, 5, 1000)),
    Step("8 + level", (1,) * 8, (700, 3, 40, 900, 16, 17, 5, 1000), True),
    Step("32", (1,) * 32, (700,) * 32),
    Step("128", (1,) * 128, (100,) * 128),
    Step("512", (512,), (512,)),
    Step("512 + level", (512,), (512,), True),
    Step("4096", (4096,), (4096,)),
)
"""32 tokens and more have the same graph of a layer, and different ones of FlexAttention."""


@dataclass(frozen=True)
class Made:
    """Of one step: kernels compiled for it, the largest shared memory of one, launches of a layer by name."""

    model: str
    step: str
    compiled: int
    shared: int
    shared_name: str
    launches: dict[str, int]
    seconds: float

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "num_launches": self.num_launches}


def config_of(name: str) -> ModelConfig:
    """A preset with one layer, experts and levels as they are; `NAME/8`: the experts of one of 8 ranks, of which the
    router sees all."""
    preset, _, ranks = name.partition("/")
    config = PRESETS[preset]
    text = replace(config.text, num_hidden_layers=1)
    if ranks:
        text = replace(text, num_experts=text.num_experts // int(ranks))
    return replace(config, text=text)


class OnFakes(TorchFunctionMode):
    """What is made on `cuda`, or brought there, has no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.to and not is_fake(args[0]):
            device = kwargs.get("device", args[1] if len(args) > 1 else None)
            if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
                return as_fake(args[0])
        device = kwargs.get("device")
        factories = (torch.tensor, torch.zeros, torch.empty, torch.arange, torch.ones)
        if device is not None and torch.device(device).type == "cuda" and func in factories:
            with MODE:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def launches(calls: Counter[str]) -> dict[str, int]:
    """Kernels by name, of what was called: views launch none, operators of ours what is inside them."""
    return {
        name: count * KERNELS_OF.get(name, 1)
        for name, count in calls.items()
        if count > 0 and name.startswith(("triton ", "aten::")) and name.partition("::")[2] not in VIEWS
    }


def fake_model(config: ModelConfig) -> Qwen3MoeForCausalLMWithDeepStack:
    with torch.device("meta"):
        model = Qwen3MoeForCausalLMWithDeepStack(config)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(fake(*parameter.shape), requires_grad=False))
    return use_kernels(model.eval())


def make(name: str, steps: tuple[Step, ...] = STEPS) -> Iterator[Made]:
    """Compile the graphs of a model's layer, one step after another; each is run twice, and the second is counted."""
    config = config_of(name)
    text, model = config.text, fake_model(config)
    router = PRESETS[name.partition("/")[0]].text.num_experts
    mlp = model.model.layers[0].mlp
    if text.num_experts != router and isinstance(mlp, SparseMoe):
        mlp.gate.weight = nn.Parameter(fake(router, text.hidden_size), requires_grad=False)
    shape = (PAGE * PAGES, text.num_key_value_heads, text.head_dim)
    cache = (fake(*shape), fake(*shape))
    CompiledDecoder(model)
    for step in steps:
        started = time.monotonic()
        SEEN.clear()
        run(model, config, cache, step)
        cubins = list(SEEN.cubins)
        SEEN.clear()
        run(model, config, cache, step)
        largest = max(cubins, key=lambda cubin: cubin.shared, default=None)
        shared, which = (largest.shared, largest.name) if largest else (0, "none")
        yield Made(name, step.name, len(cubins), shared, which, launches(SEEN.launches), time.monotonic() - started)


@torch.inference_mode()
def run(model: Qwen3MoeForCausalLMWithDeepStack, config: ModelConfig, cache: tuple[Tensor, Tensor], step: Step) -> None:
    """One layer's step; what is the same for all layers is made before."""
    text, rows = config.text, sum(step.new)
    with OnFakes():
        width = -(-max(step.contexts) // PAGE)
        tables = torch.arange(width).expand(len(step.new), -1).contiguous()
        batch = PagedBatch(step.new, step.contexts, tables, PAGE, [cache], impl="flex")
        positions = fake(3, rows, dtype=torch.int64)
        rotary = text_rotary(
            positions,
            head_dim=text.head_dim,
            theta=text.rope_theta,
            section=text.mrope_section,
            dtype=torch.bfloat16,
            yarn=text.yarn,
        )
    x_TD = fake(rows, text.hidden_size)
    level = fake(rows, config.num_deepstack_levels * text.hidden_size) if step.has_level else None
    decoder = model.model
    if not isinstance(decoder, Qwen3MoeModelWithDeepStack):
        raise TypeError(f"{type(decoder).__name__} has no levels")
    value = None if level is None else decoder._layer_input(0, input_deepstack_embeds=level)
    SEEN.launches.clear()
    model.model.step(model.model.layers[0], x_TD, rotary, batch, cache, value)
    attend(text, cache, step)


def attend(text: TextConfig, cache: tuple[Tensor, Tensor], step: Step) -> None:
    """What the layer's operator for attention does, which the compiler does not look into: it writes into the pools,
    then runs FlexAttention."""
    rows, kv_shape = sum(step.new), (sum(step.new), text.num_key_value_heads, text.head_dim)
    for pool in cache:
        pool.index_fill_(0, fake(len(step.new) * PAGE, dtype=torch.int64), 0)
        pool.index_copy_(0, fake(rows, dtype=torch.int64), fake(*kv_shape))
    kind = flex.flex_kind("cuda", PAGE, num_sequences=len(step.new), is_decode=rows == len(step.new))
    lengths = torch.tensor(step.new), torch.tensor(step.contexts)
    tables = torch.arange(-(-max(step.contexts) // PAGE)).expand(len(step.new), -1).contiguous()
    plan = flex.make_plan(kind, *lengths, tables, PAGE * PAGES, torch.device("cpu"))
    _, lists = flex.read_plan(plan.lists, plan.sizes)
    faked = flex.FlexLists(*(as_fake(getattr(lists, field.name)) for field in fields(lists)))
    flex.flex_attend(fake(rows, text.num_attention_heads, text.head_dim), *cache, kind, faked)
