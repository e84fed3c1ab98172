"""What a language rank's canary refuses: a fault in each part of the decoder, and in the experts of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen3vl_disagg.checkpoint import load_language_model
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core.errors import CanaryFailed
from qwen3vl_disagg.engine import canary as canary_module
from qwen3vl_disagg.engine.canary import Canary
from qwen3vl_disagg.engine.canary_prompts import Known
from qwen3vl_disagg.engine.runner import ModelRunner
from qwen3vl_disagg.kernels.ops import has_kernels
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.moe import Experts
from qwen3vl_disagg.parallel.dispatch import ExpertDispatcher
from qwen3vl_disagg.parallel.expert_placement import shard_rows
from qwen3vl_disagg.transport.buffers import VisualRows
from tests.support.thread_ranks import ThreadCollectives, on_ranks
from tools.checkpoints import RANDOM_PRESETS, write_random_checkpoint

FOLDER = resolve_model_folder(None)
Runner = ModelRunner
Plant = Callable[[Runner, pytest.MonkeyPatch], None]


def make_runner(dtype: torch.dtype = torch.float32, folder: Any = FOLDER, **options: Any) -> Runner:
    model = load_language_model(folder, dtype=dtype, quantize=options.pop("quantize", "none"))
    return ModelRunner(model, **{"num_pages": 32, "page_size": 4, "max_running": 4} | options)


@pytest.mark.parametrize(
    ("dtype", "quantize"), [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int8")]
)
@pytest.mark.parametrize("room", [{}, {"num_pages": 9}, {"num_pages": 1}, {"max_running": 1}, {"page_size": 1}])
def test_a_good_rank_passes_and_leaves_its_pages_empty(dtype, quantize, room):
    runner = make_runner(dtype, quantize=quantize, **room)
    Canary(runner, FOLDER, is_quantized=quantize != "none").check()
    assert not any(bool(pool.any()) for pair in runner.caches for pool in pair)


def level_of(order: dict[int, int | None]) -> Plant:
    """Layers get other levels than their own, or none."""

    def plant(runner: Runner, patch: pytest.MonkeyPatch) -> None:
        decoder = runner.model.model
        own = decoder._layer_input

        def other(layer: int, **rows: Any) -> Any:
            layer = order.get(layer, layer)
            return None if layer is None else own(layer, **rows)

        patch.setattr(decoder, "_layer_input", other)

    return plant


def other_experts(layer: int, experts: list[int], likes: list[int]) -> Plant:
    def plant(runner: Runner, _: pytest.MonkeyPatch) -> None:
        weight = runner.model.model.layers[layer].mlp.experts.down_proj.data
        weight[experts] = weight[likes].clone()

    return plant


def other_weight(name: str) -> Plant:
    def plant(runner: Runner, _: pytest.MonkeyPatch) -> None:
        weight = runner.model.get_parameter(name).data
        weight.copy_(weight.roll(1, 0))

    return plant


def stale_step(runner: Runner, patch: pytest.MonkeyPatch) -> None:
    """As a compiled layer that was made for another one: layer 2 runs what layer 1 does."""
    decoder = runner.model.model
    step = decoder.step

    def stale(layer: Any, *args: Any) -> Any:
        return step(decoder.layers[1] if layer is decoder.layers[2] else layer, *args)

    patch.setattr(decoder, "step", stale)


def stale_decode(runner: Runner, patch: pytest.MonkeyPatch) -> None:
    """The last tokens of each context are not there."""
    decode = runner.decode

    def short(sequences: Any, plan: Any = None) -> Any:
        for sequence in sequences:
            sequence.num_cached -= 4
        return decode(sequences, plan)

    patch.setattr(runner, "decode", short)


def no_levels_for_one(runner: Runner, patch: pytest.MonkeyPatch) -> None:
    splice = runner._splice

    def forgetful(ids_T: Any, chunks: Any) -> Any:
        embeds, deepstack = splice(ids_T, chunks)
        return embeds, None if len(chunks) == len(ids_T) else deepstack

    patch.setattr(runner, "_splice", forgetful)


def shifted_rows(_: Runner, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VisualRows, "_copy", _rolled(VisualRows._copy))


def _rolled(copy: Any) -> Any:
    def rolled(self: VisualRows, pieces: Any, start: int, stop: int, out: Any) -> None:
        copy(self, pieces, start, stop, out)
        out.copy_(out.roll(1, 0))

    return rolled


def rows_that_stay(_: Runner, patch: pytest.MonkeyPatch) -> None:
    """The check itself: a level that is to be zero is not, so nothing changes."""
    own = Known.rows
    patch.setattr(Known, "rows", lambda self, number, without=None: own(self, number))


FAULTS: dict[str, tuple[Plant, str]] = {
    "level lost": (level_of({1: None}), "DeepStack level 1"),
    "last level lost": (level_of({2: None}), "DeepStack level 2"),
    "levels swapped": (level_of({0: 1, 1: 0}), "DeepStack level 0"),
    "another expert": (other_experts(2, [5], [6]), "expert 5 of layer 2"),
    "experts swapped": (other_experts(1, [3, 4], [4, 3]), r"experts of layer 1: experts \[3, 4\]"),
    "another decoder": (
        other_weight("model.layers.3.self_attn.q_proj.weight"),
        "decoder: model.layers.3",
    ),
    "embedding": (other_weight("model.embed_tokens.weight"), "decoder: model.embed_tokens.weight"),
    "head": (other_weight("lm_head.weight"), "decoder: lm_head.weight"),
    "stale layer": (stale_step, "decoder layer 1 or layer 2: its weights are as in the files"),
    "stale decode step": (stale_decode, "decode step"),
    "chunk of one token": (no_levels_for_one, "chunk of one token"),
    "rows elsewhere": (shifted_rows, "visual rows"),
    "level without effect": (rows_that_stay, "DeepStack level 0: nothing changes"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, dtype, monkeypatch):
    plant, part = FAULTS[fault]
    runner = make_runner(dtype)
    plant(runner, monkeypatch)
    with pytest.raises(CanaryFailed, match=f"canary: {part}"):
        Canary(runner, FOLDER).check()


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    """bfloat16, with heads that kernels take, and a layer more than levels can be seen in."""
    folder, preset = tmp_path_factory.mktemp("random"), RANDOM_PRESETS["tiny-random"]
    text = replace(preset.text, head_dim=64, mrope_section=(12, 10, 10), moe_intermediate_size=96)
    write_random_checkpoint(folder, replace(preset, text=text), seed=3, std=0.05, dtype="bfloat16")
    return folder


@pytest.mark.skipif(not has_kernels(), reason="needs the CPU kernels")
def test_a_stale_tape_is_refused_by_its_name(random_folder, monkeypatch):
    runner = make_runner(torch.bfloat16, random_folder)
    assert runner.captured is not None
    Canary(runner, random_folder).check()
    replay = runner.captured.replay

    def stale(num_rows: int) -> None:
        runner.captured.inputs.positions += 3  # as of a tape that reads where another step wrote
        replay(num_rows)
        runner.captured.logits_RV.copy_(runner.captured.logits_RV.roll(1, 1))

    monkeypatch.setattr(runner.captured, "replay", stale)
    with pytest.raises(CanaryFailed, match="canary: captured step: logits"):
        Canary(runner, random_folder).check()


def test_of_a_large_decoder_the_layers_in_which_levels_show_are_compared(random_folder, monkeypatch):
    monkeypatch.setattr(canary_module, "WHOLE_BYTES", 0)
    runner = make_runner(torch.bfloat16, random_folder)
    layers, num_levels = runner.model.model.layers, runner.model.config.num_deepstack_levels
    layers[num_levels + 1].mlp.experts.down_proj.data.zero_()
    Canary(runner, random_folder).check()
    with pytest.raises(CanaryFailed, match=f"experts of layer {num_levels + 1}"):
        Canary(runner, random_folder).check(is_full=True)
    layers[num_levels].mlp.experts.down_proj.data[7].zero_()
    with pytest.raises(CanaryFailed, match=f"expert 7 of layer {num_levels}"):
        Canary(runner, random_folder).check()


# -- experts over ranks


class PlainDispatcher(ExpertDispatcher):
    """For weights that are cut, but no DTensors."""

    def local(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def part_of_model(collectives: ThreadCollectives) -> Qwen3MoeForCausalLMWithDeepStack:
    model = load_language_model(FOLDER, dtype=torch.float32)
    for part in model.modules():
        if isinstance(part, Experts):
            rows = shard_rows(len(part.down_proj), collectives.num_ranks, collectives.rank)
            for name in part.weight_names:
                weight = getattr(part, name).detach()[rows.start : rows.stop].clone()
                setattr(part, name, torch.nn.Parameter(weight, requires_grad=False))
            part.dispatcher = PlainDispatcher(collectives, model.config.text.num_experts)
    return model


def on_several(num_ranks: int, plant: Callable[[int, Any], None] = lambda rank, model: None, **room: Any) -> list[str]:
    """What the canary says on each rank."""

    def body(collectives: ThreadCollectives) -> str:
        model = part_of_model(collectives)
        plant(collectives.rank, model)
        sizes = {"num_pages": 32, "page_size": 4, "max_running": 4} | (room if collectives.rank == 0 else {})
        try:
            Canary(ModelRunner(model, **sizes), FOLDER, ("gather", "all_to_all")).check()
        except CanaryFailed as error:
            return str(error)
        return ""

    return on_ranks(num_ranks, body)


@pytest.mark.parametrize("room", [{}, {"num_pages": 5}, {"num_pages": 1}])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_ranks_that_share_experts_pass_together_also_one_without_room(num_ranks, room):
    assert on_several(num_ranks, **room) == [""] * num_ranks


def test_another_expert_of_one_rank_is_named_by_all():
    def plant(rank: int, model: Any) -> None:
        if rank == 1:
            model.model.layers[1].mlp.experts.gate_up_proj.data[2] *= -1

    told = on_several(2, plant)
    assert all(text.startswith("canary: expert 8 of layer 1") for text in told), told


def test_rows_that_come_back_to_other_tokens_are_noticed():
    def plant(rank: int, model: Any) -> None:
        dispatcher = model.model.layers[2].mlp.experts.dispatcher
        if rank == 0:
            combine = dispatcher.combine
            dispatcher.combine = lambda y_RD, sent: combine(y_RD, sent).roll(1, 0)

    told = on_several(2, plant)
    assert told[0].startswith("canary: experts of layer 2"), told
    assert told[1] == ""
