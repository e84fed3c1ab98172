"""A request as it comes to an engine: checked, and the sequences of its answers."""

from __future__ import annotations

import secrets
from itertools import pairwise

from msgspec import structs

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams, VisualItem
from qwen3vl_disagg.core.sampling_params import OPTIONS
from qwen3vl_disagg.engine.sampling import sample_seed
from qwen3vl_disagg.engine.sequence import Samples, Sequence
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import mrope_positions


def make_sequences(
    config: ModelConfig,
    request_id: str,
    token_ids: list[int],
    items: list[VisualItem],
    sampling: SamplingParams,
    *,
    room: int,
    due: float = FIRST_COME,
) -> list[Sequence]:
    """One for each answer. InputError if they can never run. `room`: tokens that there are keys and values for."""
    text = config.text
    if not token_ids or min(token_ids) < 0 or max(token_ids) >= text.vocab_size:
        raise InputError(f"token ids must be in 0..{text.vocab_size - 1} and at least one", param="messages")
    if sampling.is_open_ended:
        left = min(text.max_position_embeddings, room + 1) - len(token_ids)
        sampling = structs.replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, left)))
    if len(token_ids) + sampling.max_new_tokens > text.max_position_embeddings:
        raise InputError(
            f"prompt of {len(token_ids)} tokens with {sampling.max_new_tokens} new ones is longer than the "
            f"context of {text.max_position_embeddings}",
            param="messages",
        )
    _check_placeholders(config, token_ids, items)
    for name, option in OPTIONS.items():
        value = getattr(sampling, name)
        if value and max(option.kind.tokens(value), default=0) >= text.vocab_size:
            raise InputError(f"{name} takes token ids from 0 to {text.vocab_size - 1}", param=name)
    if (pooling := sampling.pooling) is not None and not (
        0 <= pooling.dimensions <= text.hidden_size and all(0 <= i < text.vocab_size for i in pooling.tokens or ())
    ):
        raise InputError(f"this model has no {pooling}: {text.hidden_size} numbers, {text.vocab_size} tokens")
    positions, delta = mrope_positions(len(token_ids), items, config.vision.spatial_merge_size)
    seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
    samples, item_timings = Samples(), dict[int, ItemTimings]()
    # The prompt is computed once, by the first of them, and so are its log probabilities.
    others = sampling if sampling.prompt_logprobs is None else structs.replace(sampling, prompt_logprobs=None)
    return [
        Sequence(
            request_id=request_id,
            token_ids=token_ids,
            items=items,
            sampling=others if number else sampling,
            positions=positions,
            delta=delta,
            seed=sample_seed(seed, number),
            sample=number,
            samples=samples,
            due=due,
            item_timings=item_timings,
        )
        for number in range(sampling.n)
    ]


def _check_placeholders(config: ModelConfig, token_ids: list[int], items: list[VisualItem]) -> None:
    kinds = {"image": config.image_token_id, "video": config.video_token_id}
    ranges = [(run, run + item.run_rows, kinds[item.modality]) for item in items for run in item.runs]
    num_pads = sum(token_ids.count(kind) for kind in kinds.values())
    if any(later < stop for (_, stop, _), (later, _, _) in pairwise(ranges)):
        raise InputError(f"the items at {ranges} are not in the order of the prompt")
    if num_pads != sum(stop - start for start, stop, _ in ranges) or any(
        token_ids[start:stop].count(kind) != stop - start for start, stop, kind in ranges
    ):
        raise InputError(f"{num_pads} placeholders in the prompt do not match the items at {ranges}")
