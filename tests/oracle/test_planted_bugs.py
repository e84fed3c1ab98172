"""The comparison with the oracle is only worth something if it notices. Each bug here is planted by hand and must show.

A bug takes a model of its own and pytest's monkeypatch.
"""

import pytest
import torch
from torch.nn import functional as F

from qwen3vl_disagg.checkpoint import load_model
from qwen3vl_disagg.model import attention, decoder, deepstack, layers, moe, rope, vision
from tests.support.oracle import CONFIGS, make_case, relative_error, run_ours


def hook_adds_the_next_level(model, monkeypatch):
    original = deepstack.Qwen3MoeModelWithDeepStack._layer_input
    monkeypatch.setattr(
        deepstack.Qwen3MoeModelWithDeepStack,
        "_layer_input",
        lambda self, layer, **inputs: original(self, layer + 1, **inputs),
    )


def deepstack_before_the_residual(model, monkeypatch):
    def step(self, layer, x, rotary, forward_batch, cache, level):
        x = x + layer.self_attn(layer.input_layernorm(x), rotary, forward_batch, cache)
        x = self._process_layer_output(x, level)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    monkeypatch.setattr(decoder.Qwen3MoeModel, "step", step)


def deepstack_before_the_layer(model, monkeypatch):
    def step(self, layer, x, rotary, forward_batch, cache, level):
        return layer(self._process_layer_output(x, level), rotary, forward_batch, cache)

    monkeypatch.setattr(decoder.Qwen3MoeModel, "step", step)


def deepstack_removed(model, monkeypatch):
    monkeypatch.setattr(deepstack.Qwen3MoeModelWithDeepStack, "_process_layer_output", lambda self, x, layer_input: x)


def deepstack_mergers_swapped(model, monkeypatch):
    mergers = model.visual.deepstack_merger_list
    mergers[0], mergers[1] = mergers[1], mergers[0]


def main_merger_swapped_with_a_deepstack_one(model, monkeypatch):
    main, level = model.visual.merger, model.visual.deepstack_merger_list[0]
    main.linear_fc1, level.linear_fc1 = level.linear_fc1, main.linear_fc1
    main.linear_fc2, level.linear_fc2 = level.linear_fc2, main.linear_fc2


def main_merger_norms_after_regrouping(model, monkeypatch):
    def forward(self, x):
        rows = x.reshape(-1, self.width)
        weight, bias = (p.repeat(self.width // len(p)) for p in (self.norm.weight, self.norm.bias))
        rows = F.layer_norm(rows, (self.width,), weight, bias, self.norm.eps)
        return self.linear_fc2(F.gelu(self.linear_fc1(rows)))

    monkeypatch.setattr(vision.PatchMerger, "forward", forward)


def gate_and_up_swapped(model, monkeypatch):
    original = moe.EXPERT_IMPLS["grouped"]

    def swapped(x, weights, ids, gate_up, down):
        return original(x, weights, ids, torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1), down)

    monkeypatch.setitem(moe.EXPERT_IMPLS, "grouped", swapped)


def dense_gate_and_up_swapped(model, monkeypatch):
    for layer in model.language_model.model.layers:
        if isinstance(layer.mlp, layers.SwiGLU):
            layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def expert_weights_not_renormalised(model, monkeypatch):
    def route(logits, k):
        weights, ids = logits.float().softmax(-1).topk(k, dim=-1)
        return weights.to(logits.dtype), ids

    monkeypatch.setattr(moe, "route", route)


def rope_sectioned(model, monkeypatch):
    def axes(num_frequencies, section):
        return [axis for axis, length in enumerate(section) for _ in range(length)]

    monkeypatch.setattr(rope, "mrope_axes", axes)


def rope_height_and_width_swapped(model, monkeypatch):
    original = rope.mrope_axes
    monkeypatch.setattr(rope, "mrope_axes", lambda n, section: [(0, 2, 1)[a] for a in original(n, section)])


def vision_rope_rows_and_columns_swapped(model, monkeypatch):
    original = vision.vision_rotary
    monkeypatch.setattr(vision, "vision_rotary", lambda coords, **kwargs: original(coords.flip(1), **kwargs))


def attention_across_images(model, monkeypatch):
    original = vision.VisionAttention.forward
    monkeypatch.setattr(
        vision.VisionAttention,
        "forward",
        lambda self, x, cu_seqlens, rotary, _: original(self, x, cu_seqlens[[0, -1]], rotary),
    )


def attention_across_sequences(model, monkeypatch):
    original = attention.PromptBatch.attend

    def attend(self, q, k, v, cache):
        return original(attention.PromptBatch([len(q)], last_only=False), q, k, v, cache)

    monkeypatch.setattr(attention.PromptBatch, "attend", attend)


def position_table_zeroed(model, monkeypatch):
    model.visual.pos_embed.weight.zero_()


def positions_without_their_last_column(model, monkeypatch):
    original = vision.PositionEmbedding.forward
    monkeypatch.setattr(
        vision.PositionEmbedding, "forward", lambda self, coords, sizes: original(self, coords, sizes + 1)
    )


def no_norm_on_queries_and_keys(model, monkeypatch):
    nothing = torch.nn.Identity()
    nothing.use_kernel = False
    for layer in model.language_model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nothing


BUGS = {
    "moe": [
        hook_adds_the_next_level,
        deepstack_before_the_residual,
        deepstack_before_the_layer,
        deepstack_removed,
        deepstack_mergers_swapped,
        main_merger_swapped_with_a_deepstack_one,
        main_merger_norms_after_regrouping,
        gate_and_up_swapped,
        expert_weights_not_renormalised,
        rope_sectioned,
        rope_height_and_width_swapped,
        vision_rope_rows_and_columns_swapped,
        attention_across_images,
        attention_across_sequences,
        position_table_zeroed,
        positions_without_their_last_column,
        no_norm_on_queries_and_keys,
    ],
    "dense": [dense_gate_and_up_swapped, rope_sectioned, hook_adds_the_next_level],
}


@pytest.mark.parametrize(
    ("name", "bug"), [pytest.param(name, bug, id=f"{name}-{bug.__name__}") for name in BUGS for bug in BUGS[name]]
)
def test_a_planted_bug_shows(pool, name, bug, monkeypatch):
    model = load_model(pool.folder(name))
    theirs = pool.expected(name, "batch")
    prompts = make_case(CONFIGS[name], "batch")
    assert relative_error(run_ours(model, prompts).logits, theirs.logits) < 1e-5
    bug(model, monkeypatch)
    assert relative_error(run_ours(model, prompts).logits, theirs.logits) > 1e-3
