"""The sampler's steps against transformers' logits processors, in transformers' order."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.sampler import ONE, Sampler, weigh
from qwen3vl_disagg.engine.sampling import SamplingPlan, SamplingRow
from tests.support.sampling import settings_of

VOCAB, EOS = 120, 3

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "repetition": {"repetition_penalty": 1.3},
    "repetition-below-one": {"repetition_penalty": 0.8},
    "bias": {"logit_bias": {5: 3.0, 7: -2.5, 9: 40.0}},
    "top-k": {"top_k": 10},
    "top-k-1": {"top_k": 1},
    "top-k-most": {"top_k": VOCAB - 1},
    "top-p": {"top_p": 0.8},
    "top-p-low": {"top_p": 0.05},
    "min-p": {"min_p": 0.1},
    "min-tokens": {"min_tokens": 6},
    "top-k-top-p": {"top_k": 20, "top_p": 0.7},
    "all": {
        "temperature": 1.4,
        "repetition_penalty": 1.2,
        "logit_bias": {2: 4.0, 11: -9.0},
        "top_k": 25,
        "top_p": 0.9,
        "min_p": 0.08,
        "min_tokens": 6,
    },
}


def theirs(logits_V: torch.Tensor, params: SamplingParams, prompt: list[int], generated: list[int]) -> torch.Tensor:
    """Probabilities, float64."""
    steps = LogitsProcessorList()
    if params.logit_bias:
        steps.append(SequenceBiasLogitsProcessor([[[i], value] for i, value in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        steps.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, EOS))
    steps.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([[*prompt, *generated]]), logits_V[None].clone())[0].double().softmax(-1)


def ours(logits_BV: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    sampler = Sampler(banned_ids=[], eos_ids=[EOS])
    plan = SamplingPlan.of(rows, vocab_size=VOCAB, eos_ids=[EOS])
    found = weigh(sampler._masked(logits_BV, plan), settings_of(plan), plan).double()
    return found / found.sum(-1, keepdim=True)


def make_rows(fields: dict, seed: int) -> tuple[torch.Tensor, list[SamplingRow]]:
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(**{"temperature": 1.0, **fields})
    count = 40
    logits = torch.randn(count, VOCAB, generator=generator) * 3
    prompts = torch.randint(0, VOCAB, (count, 9), generator=generator).tolist()
    outputs = torch.randint(0, VOCAB, (count, 12), generator=generator).tolist()
    return logits, [
        SamplingRow(params, 0, p, o[: n % 13]) for n, (p, o) in enumerate(zip(prompts, outputs, strict=True))
    ]


def check(logits: torch.Tensor, rows: list[SamplingRow]) -> None:
    found = ours(logits, rows)
    for logits_V, row, mine in zip(logits, rows, found, strict=True):
        expected = theirs(logits_V, row.params, list(row.prompt_ids), list(row.generated))
        # What is less likely than 2**-40 of the best is never picked.
        assert (mine > 0)[expected > 2 * expected.max() / ONE].all()
        assert (expected > 0)[mine > 0].all()
        assert (mine - expected).abs().max() < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_as_transformers(name):
    check(*make_rows(CASES[name], seed=len(name)))


def test_rows_of_all_kinds_at_once():
    kinds = [make_rows(fields, seed=7) for fields in CASES.values()]
    batch = [(logits[n], rows[n]) for logits, rows in kinds for n in range(0, 40, 3)]
    check(torch.stack([logits for logits, _ in batch]), [row for _, row in batch])


def test_equal_logits_at_top_ks_border_stay_as_in_transformers():
    logits, rows = make_rows({"top_k": 10}, seed=1)
    check((logits * 2).round() / 2, rows)


def test_penalties_of_openai():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, as in OpenAI's documentation; the prompt does not count."""
    logits, rows = make_rows({"presence_penalty": 0.7, "frequency_penalty": -0.4}, seed=2)
    found = ours(logits, rows)
    for logits_V, row, mine in zip(logits, rows, found, strict=True):
        expected = logits_V.double()
        for j in range(VOCAB):
            count = list(row.generated).count(j)
            expected[j] -= count * -0.4 + float(count > 0) * 0.7
        assert (mine - expected.softmax(-1)).abs().max() < 2e-6
