"""The page-free form trains: gradients reach every part, and a few steps lower the loss."""

import torch
from torch.nn import functional as F

from qwen3vl_disagg.model import ForwardBatch, Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.processing.positions import mrope_positions
from tests.support.oracle import CONFIGS, make_prompt
from tests.support.weights import SMALLEST


def loss_of(model, prompt):
    positions, _ = mrope_positions(len(prompt.ids), prompt.items, 2)
    batch = ForwardBatch.for_prompt([len(prompt.ids)], last_only=False)
    logits = model(prompt.ids, positions, batch, pixel_values=prompt.pixels, image_grid_thw=prompt.grids)
    return F.cross_entropy(logits[:-1], prompt.ids[1:])


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(CONFIGS["mixed"])
    loss_of(model, make_prompt(CONFIGS["mixed"], [20, (1, 8, 6), 20])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(SMALLEST)
    prompt = make_prompt(SMALLEST, [10, (1, 4, 4), 10])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = loss_of(model, prompt)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
