"""Before a language rank says hello: prompts with visual rows go through its decoder as they do when it serves. Keys,
values and logits have to be those of the checkpoint's own decoder, read from the files once more.

All steps are taken before anything is compared: where experts are spread, other ranks need this one for theirs.
CanaryFailed names the part: `expert e of layer i`, `DeepStack level i`, `decoder layer i`, `chunk of one token`, ..
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3vl_disagg.checkpoint.reference import Reference
from qwen3vl_disagg.core.closeness import Closeness
from qwen3vl_disagg.core.errors import CanaryFailed
from qwen3vl_disagg.engine.canary_prompts import Known, Prompts, choose_each, know
from qwen3vl_disagg.engine.runner import ModelRunner
from qwen3vl_disagg.engine.scheduler import Chunk
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.moe import DispatchKind, DispatchPlan
from qwen3vl_disagg.parallel.sizes import padded_rows

WHOLE_BYTES = 512 << 20
"""A decoder of so many bytes is compared as a whole, of a larger one the layers that a level can be seen in."""
Caches = list[tuple[Tensor, Tensor]]


@dataclass
class _Seen:
    """What came out of one way through the decoder: keys and values `[T, ..]` of each layer, logits `[B, V]`."""

    caches: Caches
    logits_BV: Tensor


@dataclass
class Canary:
    """`kinds`: how rows travel where experts are spread over ranks; there every rank has to do the same."""

    runner: ModelRunner
    folder: Path
    kinds: Seq[DispatchKind] = ()
    is_quantized: bool = False
    prompts: Prompts = field(init=False)
    able: list[Sequence] = field(init=False)
    """The prompts for which there is room."""

    def __post_init__(self) -> None:
        runner, config = self.runner, self.runner.model.config
        self.prompts = Prompts.make(config)
        self.able = self.prompts.give_pages(runner.page_size, runner.num_pages, runner.max_running)
        self._levels = min(config.num_deepstack_levels, config.text.num_hidden_layers - 1)

    @torch.inference_mode()
    def check(self, *, is_full: bool = False) -> None:
        """CanaryFailed if the rank must not serve. `is_full`: compare a large decoder as a whole, too."""
        model = self.runner.model
        with Reference(Qwen3MoeForCausalLMWithDeepStack, self.folder, model) as reference:
            is_whole = is_full or reference.num_bytes <= WHOLE_BYTES
            num_layers = model.config.text.num_hidden_layers if is_whole else self._levels + 1
            known = know(reference, self.prompts, num_layers, self.runner.dtype)
        whole, one, step, without, experts = self._run(known)
        self._check_experts(known, experts)
        if reference.differing:
            raise CanaryFailed("decoder", f"{reference.differing[0]} is not as in the checkpoint's files")
        if self.able:
            self._compare(known, whole)
            self._compare_again("chunk of one token", known, one)
            self._compare_again("captured step" if self.runner.captured else "decode step", known, step, more=1)
            self._check_levels(whole, without)

    # -- steps

    def _run(self, known: Known) -> tuple[_Seen, _Seen, _Seen, list[_Seen], list[tuple[int, Tensor]]]:
        for number, sequence in enumerate(self.able):
            sequence.rows[0] = known.rows(number)
        whole = self._prefill(self.prompts.lens[0])
        one = self._prefill(1, self.kinds[-1:])
        step = self._decode()
        without = []
        for level in range(self._levels):
            for number, sequence in enumerate(self.able):
                sequence.rows[0] = known.rows(number, without=level)
            without.append(self._prefill(self.prompts.lens[0]))
        experts = [(layer, y_ED) for layer in known.experts for y_ED in self._each_expert(layer, known)]
        self.runner.clear([page for sequence in self.able for page in sequence.pages])
        return whole, one, step, without, experts

    def _prefill(self, size: int, kinds: Seq[DispatchKind] | None = None) -> _Seen:
        """All prompts, in chunks of that many tokens at most."""
        logits: dict[str, Tensor] = {}
        longest = max(self.prompts.lens, default=1) - 1
        size = min(size, longest) if size == 1 else longest
        for start in range(0, longest, size):
            chunks = [Chunk(s, start, min(start + size, s.num_prompt)) for s in self.able if start < s.num_prompt]
            plan = self._plan(size * len(self.prompts.lens), kinds)
            if chunks:
                ends = [chunk.sequence.name for chunk in chunks if chunk.is_last]
                logits |= zip(ends, self.runner.prefill(chunks, plan).logits.clone(), strict=True)
            elif plan is not None:
                self.runner.take_part(plan)
        return self._seen([logits[s.name] for s in self.able], more=0)

    def _decode(self) -> _Seen:
        """One token behind what is in the caches."""
        plan, logits_BV = self._plan(len(self.prompts.lens)), torch.empty(0)
        for sequence, next_id in zip(self.able, self.prompts.next_ids, strict=False):
            sequence.num_cached, sequence.generated = sequence.num_prompt, [next_id]
        if self.able:
            logits_BV = self.runner.decode(self.able, plan).clone()
        elif plan is not None:
            self.runner.take_part(plan)
        for sequence in self.able:
            sequence.num_cached, sequence.generated = 0, []
        return self._seen(list(logits_BV), more=1)

    def _plan(self, rows: int, kinds: Seq[DispatchKind] | None = None) -> DispatchPlan | None:
        return DispatchPlan(padded_rows(rows), (kinds or self.kinds)[0]) if self.kinds else None

    def _each_expert(self, layer: int, known: Known) -> list[Tensor]:
        """As the layer's experts, wherever they are, make it of a row for each; in every way in which rows travel."""
        moe: Any = self.runner.model.model.layers[layer].mlp
        device = self.runner.device
        x_ED = known.experts[layer][0].to(device)
        weights_E1, ids_E1 = (x.to(device) for x in choose_each(len(x_ED)))
        plans = [self._plan(len(x_ED), [kind]) for kind in self.kinds] or [None]
        return [moe.experts(x_ED, weights_E1.to(x_ED.dtype), ids_E1, plan) for plan in plans]

    def _seen(self, logits: list[Tensor], more: int) -> _Seen:
        """`more`: tokens behind the prompts."""
        size = self.runner.page_size
        slots = [s.pages[t // size] * size + t % size for s in self.able for t in range(s.num_prompt + more)]
        slots_T = torch.tensor(slots, dtype=torch.int64, device=self.runner.device)
        caches = [(keys[slots_T], values[slots_T]) for keys, values in self.runner.caches]
        return _Seen(caches, torch.stack(logits) if logits else torch.empty(0))

    # -- comparisons

    def _closeness(self, depth: int) -> Closeness:
        """`depth`: layers before."""
        has_router = self.runner.model.config.text.num_experts > 0
        return Closeness.of(self.runner.dtype, is_quantized=self.is_quantized, depth=depth, has_router=has_router)

    def _check_experts(self, known: Known, experts: list[tuple[int, Tensor]]) -> None:
        close = Closeness(self._closeness(0).limit)
        for layer, got_ED in experts:
            expected_ED = known.experts[layer][1]
            wrong = [e for e in range(len(got_ED)) if not close.is_close(got_ED[e : e + 1], expected_ED[e : e + 1])]
            if wrong:
                part = f"expert {wrong[0]} of layer {layer}" if len(wrong) == 1 else f"experts of layer {layer}"
                raise CanaryFailed(part, f"experts {wrong[:8]} do not give what those in the files do")

    def _tokens(self, more: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the known tokens: those of prompts that ran, with `more` behind them; of these the visual ones; the last
        one of each prompt."""
        stops_B = torch.tensor(self.prompts.lens[: len(self.able)]).cumsum(0)
        is_here_T = torch.ones(int(stops_B[-1]), dtype=torch.bool)
        if not more:
            is_here_T[stops_B - 1] = False
        here = is_here_T.nonzero()[:, 0]
        return here, self.prompts.is_visual_T[here], stops_B - (1 if more else 2)

    def _first_wrong(self, known: Known, seen: _Seen, more: int) -> tuple[int, bool] | None:
        """The first layer whose keys and values are wrong (behind the last one: the logits), and whether only those of
        visual tokens are."""
        here, is_visual, last = self._tokens(more)
        for layer, expected in enumerate(known.caches):
            close = self._closeness(layer)
            are_right = [
                all(close.is_close(x[rows], y[here][rows]) for x, y in zip(seen.caches[layer], expected, strict=True))
                for rows in ((~is_visual).nonzero()[:, 0], is_visual.nonzero()[:, 0])
            ]
            if not all(are_right):
                return layer, are_right[0]
        # Of a few rows, each of which may have gone another way: what is coarse is compared coarsely.
        close = self._closeness(sys.maxsize)
        if known.logits_TV is not None and not close.is_close(seen.logits_BV, known.logits_TV[last]):
            return len(known.caches), False
        return None

    def _compare(self, known: Known, whole: _Seen) -> None:
        found = self._first_wrong(known, whole, more=0)
        if found is None:
            return
        layer, is_only_visual = found
        if is_only_visual and layer == 0:
            raise CanaryFailed("visual rows", "they are not where the prompt has its image")
        if is_only_visual and layer <= self._levels:
            raise CanaryFailed(f"DeepStack level {layer - 1}", "it is not what is added to the layer of that number")
        # Keys and values are of one layer's norm and projections, and of all that the layer before has made.
        behind = f"layer {layer}" if layer < len(known.caches) else "head"
        part = f"decoder layer {layer - 1} or {behind}" if layer else "decoder layer 0"
        how = "as compiled, it" if self.runner.compiled else "it"
        raise CanaryFailed(part, f"its weights are as in the files, but {how} gives what the files' decoder does not")

    def _compare_again(self, part: str, known: Known, seen: _Seen, more: int = 0) -> None:
        """Another way through what is known to be right."""
        found = self._first_wrong(known, seen, more)
        if found is not None:
            what = "logits" if found[0] == len(known.caches) else f"keys and values of layer {found[0]}"
            raise CanaryFailed(part, f"{what} are not those of the checkpoint's own decoder")

    def _check_levels(self, whole: _Seen, without: list[_Seen]) -> None:
        rows = self._tokens(0)[1].nonzero()[:, 0]
        for level, seen in enumerate(without):
            close = self._closeness(level + 1)
            if close.is_close(seen.caches[level + 1][0][rows], whole.caches[level + 1][0][rows]):
                raise CanaryFailed(f"DeepStack level {level}", "nothing changes where it is zero")
