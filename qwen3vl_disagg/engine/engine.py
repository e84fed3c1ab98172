"""The engine: requests in, visual rows in, tokens out, one step at a time. Single-threaded; it never waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from qwen3vl_disagg.core.devices import raise_if_lost
from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import DisaggError, Failure, InputError, ServerError
from qwen3vl_disagg.core.requests import ItemTimings, SamplingParams, VisualItem
from qwen3vl_disagg.core.settings import EngineSettings
from qwen3vl_disagg.core.spans import span
from qwen3vl_disagg.engine.ahead import StepAhead
from qwen3vl_disagg.engine.failures import NotFinite, fatal_where
from qwen3vl_disagg.engine.grammars import Grammars, no_grammars
from qwen3vl_disagg.engine.graphs import GraphedDecode, GraphedPick
from qwen3vl_disagg.engine.pace import Pace
from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.engine.picking import Broken, Pick, Picker
from qwen3vl_disagg.engine.pooling import pool
from qwen3vl_disagg.engine.requests import make_sequences
from qwen3vl_disagg.engine.runner import AttentionChoice, BadRows, ModelRunner
from qwen3vl_disagg.engine.sampler import Sampler
from qwen3vl_disagg.engine.scheduler import Chunk, Scheduler, SchedulerLimits, Step
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack
from qwen3vl_disagg.model.moe import DispatchPlan
from qwen3vl_disagg.parallel.kv_room import KvRoom, measured_room
from qwen3vl_disagg.parallel.lockstep import Outlook, PaceLimits, StepPlan
from qwen3vl_disagg.protocol.messages import Finished, NeedItems, PromptLogprobs, RequestFailed, Tokens
from qwen3vl_disagg.protocol.session_events import Consumed
from qwen3vl_disagg.transport.buffers import VisualRows

logger = logging.getLogger(__name__)
MAX_NOTES = 4096


@dataclass(frozen=True)
class Preempted:
    """The request gave its pages up: until it says NeedItems again, it needs no rows."""

    request_id: str


EngineEvent = NeedItems | Preempted | Consumed | PromptLogprobs | Tokens | Finished | RequestFailed


@dataclass(frozen=True, kw_only=True)
class EngineOptions(SchedulerLimits):
    """All that an engine may be told. The pool of keys and values is never larger than the longest context for each
    running request needs."""

    prefix_cache: bool = True
    """Remember what full pages hold."""
    compile: bool = False
    """Compile the decoder's step, all graphs before the first request."""
    attention: AttentionChoice = "auto"
    """`auto`: FlexAttention in a compiled decoder on CUDA, else the kernels on CPU where they can, else SDPA."""

    @property
    def pace_limits(self) -> PaceLimits:
        return PaceLimits(self.chunk_tokens, self.max_prefill_tokens)

    @classmethod
    def of(cls, settings: EngineSettings, **others: Any) -> EngineOptions:
        """The settings' sizes, and what they do not say."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(EngineSettings)}, **others)


class Engine:
    """Continuous batching over one model.

    `add` a request; when `step` says NeedItems, bring each item's rows with `provide_rows`, all at once or part by part
    as `step` says Consumed; `step` returns tokens and the end of each request. `cancel` at any time.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLMWithDeepStack,
        *,
        eos_ids: frozenset[int],
        options: EngineOptions | None = None,
        room: KvRoom | None = None,
        language_rank: int = 0,
        progress: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        self.config, self.eos_ids = model.config, eos_ids
        self.options = options or EngineOptions()
        weight = model.model.embed_tokens.weight
        self.room = room or measured_room(model.config, self.options, weight.device, weight.dtype)
        pool = PagePool(self.room.num_pages, self.room.page_size, keep=self.options.prefix_cache)
        self.runner = ModelRunner(
            model,
            num_pages=pool.num_pages,
            page_size=pool.page_size,
            attention=self.options.attention,
            max_running=self.options.max_running,
            compile=self.options.compile,
            progress=progress,
        )
        self.scheduler = Scheduler(pool, self.options)
        target, is_cuda = self.options.gap_target_ms, weight.device.type == "cuda"
        most = self.options.max_prefill_tokens
        self._pace = None if target is None else Pace(self.options.chunk_tokens, most, target, is_cuda=is_cuda)
        banned = (self.config.image_token_id, self.config.video_token_id)
        self.sampler = Sampler(banned_ids=banned, eos_ids=eos_ids)
        self._ahead: StepAhead | None = None
        self._decoded_at = 0.0
        if isinstance(self.runner.captured, GraphedDecode):
            self.sampler.captured = GraphedPick(self.sampler, self.runner.captured)
            self._ahead = StepAhead(self.runner.captured, self.sampler.captured)
        self._picker = Picker(self.sampler, eos_ids=eos_ids, language_rank=language_rank)
        self.grammars = grammars
        self._compiling: dict[str, list[Sequence]] = {}
        """Requests whose grammars are not there yet; they are queued when they are, all answers together."""
        self._is_ready = threading.Event()
        self.on_ready: Callable[[], None] = self._is_ready.set
        """Called by other threads, when a grammar's first mask, or one that a step did not wait for, is there."""
        self._notes: dict[object, str] = {}
        """By content address: items whose rows are in the cache are not sent again, and what is missing of them stays.
        """

    @property
    def has_work(self) -> bool:
        """Whether `step` could do something now (not: whether requests wait for their items)."""
        return self.scheduler.has_step

    @property
    def owes_decode(self) -> bool:
        """The last step was prefill, and running requests wait for their next token."""
        return self.scheduler.owes_decode

    @property
    def is_empty(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.admitted and not self._compiling

    def wait(self, timeout_s: float) -> bool:
        """Until `on_ready` is called, for who has nothing else to do. False if there is nothing to wait for."""
        if not self._compiling and not any(s.masks and s.masks.is_late for s in self.scheduler.admitted.values()):
            return False
        self._is_ready.wait(timeout_s)
        return True

    def add(
        self,
        request_id: str,
        token_ids: list[int],
        items: list[VisualItem],
        sampling: SamplingParams,
        *,
        due: float = FIRST_COME,
    ) -> None:
        """Queue a request, one with a grammar once that is compiled. InputError if it can never run. `due`: see
        `Sequence`."""
        if sampling.grammar is not None and self.grammars is None:
            raise no_grammars(sampling.grammar.param)
        pages = self.scheduler.pool
        room = pages.num_pages * pages.page_size
        sequences = make_sequences(self.config, request_id, token_ids, items, sampling, room=room, due=due)
        # So that it may come at all.
        self.sampler.narrowed(sequences[0].sampling_row, None, self.config.text.vocab_size)
        for index, item in enumerate(items):
            if note := self._notes.get(item.content):
                sequences[0].item_timings[index] = ItemTimings(rows=item.num_rows, note=note)
        self.scheduler.check(sequences[0])
        if sampling.grammar is not None and self.grammars is not None:
            self._compiling[request_id] = sequences
            masks = self.grammars.start(sampling.grammar, token_ids, len(sequences))
            for sequence, its_masks in zip(sequences, masks, strict=True):
                sequence.masks = its_masks
            masks[0].on_started(self.on_ready)
            return
        for sequence in sequences:
            self.scheduler.add(sequence)

    def _reader(self, request_id: str) -> Sequence | None:
        """Who of the request's answers reads visual rows; or has the whole prompt, as all that are running."""
        samples = self.scheduler.samples.get(request_id)
        return samples.admitted[0] if samples and samples.admitted else None

    def provide_rows(
        self, request_id: str, index: int, rows: VisualRows, timings: ItemTimings | None
    ) -> list[EngineEvent]:
        """These rows of an item are here, in place of those of before; `timings`, if given, replace its timings.

        Ignored for requests that are not running (cancelled or preempted meanwhile). Rows that are all in the cache
        are used at once.
        """
        sequence = self._reader(request_id)
        if sequence is None:
            return []
        item = sequence.items[index]
        if item.rows_before(sequence.num_cached) >= rows.stop:
            return [Consumed(request_id, index, rows.attempt, rows.stop)]
        if rows.start > item.rows_before(sequence.num_cached):
            return []  # of an attempt before, on its way when the item was restarted or another answer came to read it
        sequence.rows[index] = rows
        if timings is not None:
            sequence.item_timings[index] = timings
            if timings.note:
                self._notes[item.content] = timings.note
                if len(self._notes) > MAX_NOTES:
                    del self._notes[next(iter(self._notes))]
        return []

    def restart_item(self, request_id: str, index: int) -> None:
        """The attempt behind an item's rows is over; what was taken from it must not meet rows of another one.

        Prefill goes back to the item's first needed row. An item that is all in the cache is whole, and stays.
        """
        sequence = self._reader(request_id)
        if sequence is None:
            return
        if sequence.num_cached < sequence.items[index].stop:
            sequence.restart(index)

    def reset(self) -> None:
        """Forget all requests, and what the pages hold."""
        pool = self.scheduler.pool
        self._compiling.clear()
        self.scheduler = Scheduler(PagePool(pool.num_pages, pool.page_size, keep=pool.keep), self.options)

    def set_short_of_room(self, is_short: bool) -> None:
        """Rows wait for the blocks of those that are here, which should be used up now."""
        self.scheduler.is_short_of_room = is_short

    def cancel(self, request_id: str, sample: int | None = None) -> None:
        """Forget a request, or one of its answers, if it is known."""
        for sequence in list(self._compiling.get(request_id, ())):
            if sample in (None, sequence.sample):
                self._compiling[request_id].remove(sequence)
                if sequence.masks is not None:
                    sequence.masks.drop()
        if not self._compiling.get(request_id):
            self._compiling.pop(request_id, None)
        self.scheduler.remove(request_id, sample)

    def admit(self) -> list[EngineEvent]:
        """Take in what fits, and begin the answers to prompts that are known. `step` does it too; this is for those who
        cannot run a step yet."""
        self._is_ready.clear()
        events = self._take_compiled()
        while True:
            for sequence in self.scheduler.admit():
                events += self._take_in(sequence)
            starting = [s for s in self.scheduler.admitted.values() if s.can_begin]
            if not starting:
                return events
            events += self._begin(starting)

    def _take_in(self, sequence: Sequence) -> list[EngineEvent]:
        sequence.admitted_at = sequence.admitted_at or time.monotonic()
        if sequence.copied is not None:
            page, count = sequence.copied
            self.runner.copy(page, sequence.pages[sequence.num_prompt // self.runner.page_size], count)
        lacking = [i for i, item in enumerate(sequence.items) if sequence.first_row(i) < item.num_rows]
        if not lacking:
            return []
        first_rows = [sequence.first_row(index) for index in lacking]
        return [NeedItems(request_id=sequence.request_id, items=lacking, first_rows=first_rows)]

    def _begin(self, batch: list[Sequence]) -> list[EngineEvent]:
        """The first tokens of answers whose prompt another one has computed; no step of the model."""
        try:
            logits_BV = torch.stack([sequence.samples.share(sequence) for sequence in batch])
            picks, broken = self._picker.pick(logits_BV, batch, self.on_ready, is_alone=False)
        except (RuntimeError, ValueError) as error:
            return self._fail(batch, error)
        return self._settle(picks, broken)

    def _take_compiled(self) -> list[EngineEvent]:
        """Queue those whose grammars are there, and fail those whose grammars are none."""
        events: list[EngineEvent] = []
        for request_id, sequences in list(self._compiling.items()):
            masks = [sequence.masks for sequence in sequences if sequence.masks is not None]
            if not all(one.is_started for one in masks):
                continue
            del self._compiling[request_id]
            try:
                for one in masks:
                    one.begin()
                for sequence in sequences:
                    self.scheduler.add(sequence)
            except Exception as error:
                events += self._fail(sequences, error)
        return events

    def outlook(self, step: int) -> Outlook:
        """What could be run now, for those with whom steps are taken together."""
        scheduler = self.scheduler
        prefill = scheduler.num_prefill_tokens
        chunk = scheduler.chunk_tokens if prefill else 0
        return Outlook(step=step, prefill=prefill, decode=scheduler.num_decoding, chunk=chunk)

    def step(self, plan: StepPlan | None = None) -> list[EngineEvent]:
        """Admit what fits and run one batch. A failure of the batch fails its requests alone.

        `plan`: where experts are spread over ranks, what these have agreed on. Then every step runs, also without
        anything to run here, and a failure of the model is raised: the others wait for this rank's part.
        """
        events = self.admit()
        dispatch = None if plan is None else DispatchPlan(plan.num_rows, plan.kind)
        begun = self._ahead.taken(self.scheduler.admitted) if self._ahead is not None else []
        step, preempted = (Step(decode=begun), []) if begun else self.scheduler.schedule(plan)
        # Those who stay have the whole prompt, and whoever comes back has it from them.
        gone = dict.fromkeys(sequence.request_id for sequence in preempted if not sequence.samples.admitted)
        events += [Preempted(request_id) for request_id in gone]
        if step is None:
            self._take_part(dispatch)
            return events
        if step.prefill:
            return events + self._prefill(step.prefill, plan, dispatch)
        started = self._decoded_at if begun else time.monotonic()
        try:
            names = [sequence.request_id for sequence in step.decode]
            with span("decode", tokens=len(step.decode), requests=names), fatal_where(dispatch):
                ahead = self._ahead if begun else None
                logits = self.runner.decode(step.decode, dispatch) if ahead is None else ahead.logits()
            if self._ahead is not None and plan is None:
                self._ahead.plan(logits, step.decode, self.scheduler)
            picks, broken = self._picker.pick(logits, step.decode, self.on_ready, is_alone=self._is_alone(plan))
        except (RuntimeError, ValueError) as error:
            return events + self._fail(step.decode, error)
        self._decoded_at = time.monotonic()
        if self._pace is not None and not (plan and plan.prefill):
            self._pace.decoded(self._decoded_at - started)
        for sequence, _, _ in picks:
            sequence.num_cached += 1
            self.scheduler.remember(sequence)
        return events + self._settle(picks, broken)

    def _take_part(self, dispatch: DispatchPlan | None) -> None:
        if dispatch is not None:
            with span("take part", tokens=0), fatal_where(dispatch):
                self.runner.take_part(dispatch)

    def _prefill(self, chunks: list[Chunk], plan: StepPlan | None, dispatch: DispatchPlan | None) -> list[EngineEvent]:
        """Run chunks of prompts; those that end one give its first token, or what is pooled of it."""
        started = time.monotonic()
        events: list[EngineEvent] = []
        try:
            while True:
                try:
                    tokens = sum(chunk.stop - chunk.start for chunk in chunks)
                    names = [chunk.sequence.request_id for chunk in chunks]
                    used = [(c.sequence.request_id, i) for c in chunks for i, *_ in c.sequence.touched(c.start, c.stop)]
                    with span("prefill", tokens=tokens, requests=names, items=used), fatal_where(dispatch):
                        made = self.runner.prefill(chunks, dispatch)
                    break
                except BadRows as error:  # that request's failure alone; nothing has been computed yet
                    events += self._fail([error.sequence], error)
                    chunks = [chunk for chunk in chunks if chunk.sequence is not error.sequence]
                    if not chunks:
                        self._take_part(dispatch)
                        return events
            ended = [chunk.sequence for chunk in chunks if chunk.is_last]
            wanted = [(sequence, sequence.sampling.pooling) for sequence in ended if sequence.sampling.pooling]
            vectors = pool(made.pooled, [pooling for _, pooling in wanted], self.runner.model.lm_head)
            answering = [sequence for sequence in ended if sequence.sampling.pooling is None]
            for sequence, logits_V in zip(answering, made.logits, strict=True):
                sequence.samples.keep(sequence, logits_V)
            picks, broken = self._picker.pick(made.logits, answering, self.on_ready, is_alone=self._is_alone(plan))
            is_sound = made.is_sound.tolist()  # for chunks that end no prompt this is the wait
        except (RuntimeError, ValueError) as error:
            return events + self._fail([chunk.sequence for chunk in chunks], error)
        now = time.monotonic()
        budget = None if plan is None else plan.prefill
        if self._pace is not None and (self.scheduler.num_decoding if budget is None else budget < self._pace.most):
            # Somebody waited. The step of ranks together is as long as that of the one with most to do.
            self._pace.prefilled(min(plan.prefill, plan.num_rows) if plan else tokens, now - started)
            self.scheduler.chunk_tokens = self._pace.chunk
        pooled = [(sequence, vector) for (sequence, _), vector in zip(wanted, vectors, strict=True)]
        answered = {pick[0].name for pick in picks} | {sequence.name for sequence, _ in pooled}
        others = [chunk.sequence for chunk in chunks if not chunk.is_last]
        broken += [(sequence, NotFinite()) for sequence, ok in zip(others, is_sound, strict=True) if not ok]
        broken += [(sequence, NotFinite()) for sequence, vector in pooled if vector is None]
        lost = {sequence.name for sequence, _ in broken}
        for told in made.scores:
            sequence = told.chunk.sequence
            if sequence.name not in lost:
                events.append(told.message())
                sequence.num_scored = told.first + len(told.own_R)
        for chunk in chunks:
            chunk.sequence.prefill_s += now - started
            if chunk.sequence.name not in lost:
                events += self._advance(chunk, is_late=chunk.is_last and chunk.sequence.name not in answered)
        for sequence, vector in pooled:
            if vector is not None:
                sequence.first_token_at = now
                events.append(self._picker.finished(sequence, "stop", now, vector))
                self.scheduler.remove(sequence.request_id, sequence.sample)
        return events + self._settle(picks, broken)

    def _advance(self, chunk: Chunk, *, is_late: bool) -> list[EngineEvent]:
        """The chunk is in the cache: its rows are used. `is_late`: its last token comes again."""
        sequence, events = chunk.sequence, list[EngineEvent]()
        sequence.num_cached = chunk.stop - is_late
        self.scheduler.remember(sequence)
        for index, _, stop in sequence.touched(chunk.start, chunk.stop):
            rows = sequence.rows[index]
            events.append(Consumed(sequence.request_id, index, rows.attempt, stop))
            if stop == rows.stop:
                del sequence.rows[index]
        return events

    def _is_alone(self, plan: StepPlan | None) -> bool:
        """Nobody waits for the one request that is here."""
        others = self._compiling or self.scheduler.waiting
        return plan is None and len(self.scheduler.admitted) == 1 and not others

    def _settle(self, picks: list[Pick], broken: list[Broken]) -> list[EngineEvent]:
        """What came of a batch: tokens, the ends that come with them, and those that cannot go on."""
        events: list[EngineEvent] = [*self._picker.accept(picks)]
        for sequence, _, _ in picks:
            if sequence.finish_reason:
                self.scheduler.remove(sequence.request_id, sequence.sample)
        events += self._fail([sequence for sequence, error in broken if isinstance(error, NotFinite)], NotFinite())
        for sequence, error in broken:
            if not isinstance(error, NotFinite):
                events += self._fail([sequence], error)
        return events

    def _fail(self, batch: list[Sequence], error: Exception) -> list[EngineEvent]:
        """End requests that could not run, with all of their answers. The cause goes to the log; clients get no
        internals. Their pages come back clean, whatever was written before it failed. DeviceLost if there is no more
        device to go on with."""
        raise_if_lost(error)
        if not batch:
            return []
        names = list(dict.fromkeys(sequence.request_id for sequence in batch))
        if isinstance(error, NotFinite):
            logger.error("numbers that are not finite: %s", ", ".join(names))
        elif not isinstance(error, InputError):
            logger.error("a step failed", exc_info=error)
        if not isinstance(error, DisaggError):
            error = ServerError("the language model failed on this request", code="engine_error")
        pool = self.scheduler.pool
        self.runner.clear([page for sequence in batch for page in pool.unknown(sequence.pages)])
        for name in names:
            self.scheduler.remove(name)
        return [RequestFailed(request_id=name, failure=Failure.of(error)) for name in names]
