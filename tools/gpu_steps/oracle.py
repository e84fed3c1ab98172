"""`transformers` with the very weights of ours: not copied but shared, so that both fit on one card."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qwen3vl_disagg.model import ForwardBatch, Qwen3MoeForCausalLMWithDeepStack
from tools.bench_contestants.this_project import decode_stamps
from tools.bench_stats import decode_rate
from tools.checkpoints import config_to_dict, module_tensors
from tools.gpu_steps.sizes import Sizes, difference, language_model, make_engine, prompt, sizes_of, wait
from tools.gpu_steps.step import Check

GREEDY = 16
MOST_OFF = 0.05
"""Of the largest logit: bfloat16 through all layers, in another order."""


def theirs_of(model: Qwen3MoeForCausalLMWithDeepStack, sizes: Sizes, device: str) -> Any:
    """Their decoder around our tensors; the tower stays without memory, and is not asked."""
    config = AutoConfig.for_model(**config_to_dict(sizes.config, spelling="v5"))
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    missing, unexpected = theirs.load_state_dict(module_tensors(model), strict=False, assign=True)
    missing = [name for name in missing if ".visual." not in name]
    if missing or unexpected:
        raise RuntimeError(f"names differ: {missing[:3]} missing, {list(unexpected)[:3]} unexpected")
    decoder = theirs.model.language_model
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config.text_config).to(device)
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


@torch.inference_mode()
def same_weights(check: Check) -> None:
    sizes = sizes_of(check)
    model = language_model(check)
    engine = make_engine(check, model)
    ids = prompt(sizes, sizes.context, 1)
    ids_T = torch.tensor(ids, device=check.device)
    batch = ForwardBatch.for_prompt([len(ids)], last_only=True)
    with check.part("logits"):
        theirs = theirs_of(model, sizes, check.device)
        expected = theirs(input_ids=ids_T[None]).logits[0, -1]
        actual = model(ids_T, torch.arange(len(ids), device=check.device).expand(3, -1), batch)[0]
        off = difference(actual, expected)
        check.say(logits={"difference": off, "same first": bool(actual.argmax() == expected.argmax())})
        if off > MOST_OFF:
            raise RuntimeError(f"logits differ by {off:.3g} of the largest, {MOST_OFF} is the most")
        compare_tokens(check, theirs, engine, ids)
        for size in sizes.batches:
            check.say(**{f"decode_{size}": rates(check, theirs, engine, size)})


def generated(theirs: Any, prompts: list[list[int]], count: int, device: str) -> list[list[int]]:
    ids = torch.tensor(prompts, device=device)
    mask = torch.ones_like(ids)
    out = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[:, ids.shape[1] :].tolist()


def compare_tokens(check: Check, theirs: Any, engine: Any, ids: list[int]) -> None:
    """How many greedy tokens agree from the first on: random weights have ties, so this is told and not demanded."""
    from qwen3vl_disagg.core.requests import SamplingParams
    from qwen3vl_disagg.protocol.messages import Tokens

    engine.add("greedy", ids, [], SamplingParams(max_new_tokens=GREEDY, temperature=0.0, ignore_eos=True))
    ours: list[int] = []
    while not engine.is_empty:
        ours += [token for event in engine.step() if isinstance(event, Tokens) for token in event.token_ids]
    [other] = generated(theirs, [ids], GREEDY, check.device)
    same = next((i for i, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b), GREEDY)
    check.say(greedy={"same from the first": same, "of": GREEDY})


def rates(check: Check, theirs: Any, engine: Any, size: int) -> dict[str, float]:
    """Tokens/s of both, decoding `size` at once; theirs from the difference of two lengths."""
    sizes = sizes_of(check)
    prompts = [prompt(sizes, sizes.context, 400 + 100 * size + i) for i in range(size)]
    ours = decode_rate(decode_stamps(engine, prompts, sizes.new_tokens))
    seconds = []
    for count in (1, 1, sizes.new_tokens):
        started = time.perf_counter()
        generated(theirs, prompts, count, check.device)
        wait(check.device)
        seconds.append(time.perf_counter() - started)
    other = size * (sizes.new_tokens - 1) / (seconds[2] - seconds[1])
    return {"ours tokens/s": ours, "transformers tokens/s": other, "times": ours / other}
