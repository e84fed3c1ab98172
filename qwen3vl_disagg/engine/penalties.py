"""What requests add to and take from logits: rows over the vocabulary, on the logits' device.

A request's row is filled when its first token is sampled. After that one token changes it at a step, so the work of a
step depends neither on the prompt's length nor on the answer's.

Dims: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qwen3vl_disagg.engine.sampling import MAX_BIAS, SamplingRow

_NEUTRAL = {"bias": 0.0, "factor": 1.0, "minus": 0.0}


@dataclass
class _Entry:
    """A request's row, the tables that it needs, and what of its answer is in them."""

    row: int
    needs: tuple[str, ...]
    counts: dict[int, int] = field(default_factory=dict)
    num_counted: int = 0


class Penalties:
    """Logit bias, and repetition, presence and frequency penalties.

    A logit x becomes y - minus, where with x + bias for x: y = x / repetition if x is positive, else x * repetition,
    for tokens of prompt and answer (as in transformers), else x. minus: presence + frequency x count in the answer.
    """

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[SamplingRow, _Entry] = WeakKeyDictionary()
        """A request that is gone gives its row back."""
        self._tables: dict[str, Tensor] = {}
        """`[R, V]` float32 each, of what some request has needed; neutral in the rows of those that do not."""
        self._num_rows = 0

    def apply(self, logits_BV: Tensor, numbers: Sequence[int], requests: Sequence[SamplingRow]) -> None:
        """Change these rows of the logits in place."""
        entries = self._bring_up(requests, logits_BV)
        if logits_BV.device.type == "cpu":  # row by row: what is worked on stays in the core's cache
            for number, entry in zip(numbers, entries, strict=True):
                _change(logits_BV[number], {name: self._tables[name][entry.row] for name in entry.needs})
            return
        numbers_R, rows_R = upload([numbers, [entry.row for entry in entries]], logits_BV.device)
        needs = {name for entry in entries for name in entry.needs}
        tables = {name: self._tables[name].index_select(0, rows_R.long()) for name in needs}
        logits_RV = logits_BV.index_select(0, numbers_R.long())
        _change(logits_RV, tables)
        logits_BV.index_copy_(0, numbers_R.long(), logits_RV)

    def _bring_up(self, requests: Sequence[SamplingRow], logits_BV: Tensor) -> list[_Entry]:
        """Each request's entry, with all of its answer in the tables."""
        vocab_size = logits_BV.shape[1]
        changed: dict[str, dict[int, float]] = {"factor": {}, "minus": {}}
        entries = []
        for request in requests:
            entry, params = self._entries.get(request) or self._enter(request, logits_BV), request.params
            new, entry.num_counted = request.generated[entry.num_counted :], len(request.generated)
            for token_id in new:
                entry.counts[token_id] = count = entry.counts.get(token_id, 0) + 1
                place = entry.row * vocab_size + token_id
                if "factor" in entry.needs:
                    changed["factor"][place] = params.repetition_penalty
                if "minus" in entry.needs:
                    changed["minus"][place] = params.frequency_penalty * count + params.presence_penalty
            entries.append(entry)
        for name, values in changed.items():
            if values:
                places, column = upload([list(values), list(values.values())], logits_BV.device)
                self._tables[name].view(-1).index_copy_(0, places.long(), column.float())
        return entries

    def _enter(self, request: SamplingRow, logits_BV: Tensor) -> _Entry:
        """A row for a new request, with its prompt and its biases in it."""
        params, device = request.params, logits_BV.device
        taken = {entry.row for entry in self._entries.values()}
        row = next(row for row in range(len(taken) + 1) if row not in taken)
        is_on = {
            "bias": bool(params.logit_bias),
            "factor": params.repetition_penalty != 1,
            "minus": bool(params.presence_penalty or params.frequency_penalty),
        }
        entry = _Entry(row, tuple(name for name in _NEUTRAL if is_on[name]))
        self._make_room(row, entry.needs, logits_BV)
        if params.logit_bias:
            values = [min(max(value, -MAX_BIAS), MAX_BIAS) for value in params.logit_bias.values()]
            ids, column = upload([list(params.logit_bias), values], device)
            self._tables["bias"][row].index_copy_(0, ids.long(), column.float())
        if is_on["factor"] and len(request.prompt_ids):
            [ids] = upload([request.prompt_ids], device)
            self._tables["factor"][row].index_fill_(0, ids.long(), params.repetition_penalty)
        self._entries[request] = entry
        return entry

    def _make_room(self, row: int, needs: Sequence[str], logits_BV: Tensor) -> None:
        """The tables named have this row, and in all tables it is neutral."""
        if row >= self._num_rows:
            self._num_rows = max(4, (row + 1) * 3 // 2)
        for name in {*self._tables, *needs}:
            old = self._tables.get(name)
            if old is None or len(old) < self._num_rows:
                shape = (self._num_rows, logits_BV.shape[1])
                self._tables[name] = torch.full(shape, _NEUTRAL[name], device=logits_BV.device)
                if old is not None:
                    self._tables[name][: len(old)] = old
            self._tables[name][row].fill_(_NEUTRAL[name])


def _change(logits: Tensor, tables: dict[str, Tensor]) -> None:
    """In place; the tables of the same rows."""
    if "bias" in tables:
        logits += tables["bias"]
    if "factor" in tables:  # no selection, which is slow on a CPU: one of the two is 0, and adds nothing
        positive = logits.clamp(min=0).div_(tables["factor"])
        logits.clamp_(max=0).mul_(tables["factor"]).add_(positive)
    if "minus" in tables:
        logits -= tables["minus"]


def upload(columns: Sequence[Sequence[float]], device: torch.device) -> tuple[Tensor, ...]:
    """Columns of numbers as float64 vectors on the device, in one transfer that is not waited for.

    From memory that is not pinned, the copy would wait for all that is queued.
    """
    table = torch.tensor(columns, dtype=torch.float64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True).unbind(0)
