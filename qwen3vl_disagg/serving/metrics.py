"""`/metrics`: what Prometheus reads. Names end as vLLM's do where they mean the same, those of the encoder as SGLang's.

Times and counts are taken as answers grow (`watching.py`); what ranks have to do is what they said last. A page is made
on a thread, of what the event loop saw when it was asked for, and is good for REST times as long as it took: with many
ranks that are tens of milliseconds, and whoever asks again and again gets no more of this process than a part in REST.
Numbers should be new, however: the rest is MAX_AGE_S at most, and pages that take longer than a part in REST of that
may take more of the process.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, exposition
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.requests import Request
from starlette.responses import Response

from qwen3vl_disagg.cluster.backend import Backend
from qwen3vl_disagg.cluster.loads import Load
from qwen3vl_disagg.cluster.registry import RankKey
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings
from qwen3vl_disagg.protocol.messages import LanguageLoad

METRICS_PATH = "/metrics"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKENS = tuple(float(2**n) for n in range(0, 19, 2))
REST, MAX_AGE_S = 20.0, 1.0
MAX_RANKS = 64
"""Encode ranks with series of their own: those that join never have the number of one before."""
GONE_S = 300.0
"""Series of one that has left are shown for so long: some looks of Prometheus."""


class Metrics:
    """Of one server, in a registry of its own. `hides_cache_hits`: there is nothing in it from which a client could
    tell that what it sent was there already."""

    def __init__(self, backend: Backend, *, hides_cache_hits: bool = False) -> None:
        self._registry = registry = CollectorRegistry()
        self._hides, self._ranks = hides_cache_hits, dict[str, float]()
        """Rank with series of its own -> when it was seen last."""
        self._backend = backend
        self._loads = _Loads(backend, hides_cache_hits=hides_cache_hits)
        registry.register(self._loads)
        self._pages: dict[bool, _Page] = {}
        """The last one of each form."""
        self._making = asyncio.Lock()
        self.hits = Counts[str]()
        """Tokens and items looked for in caches, and found, as the page of what ranks do shows them."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace="q3vl", registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, text, labels, namespace="q3vl", registry=registry, buckets=buckets)

        self._http = counter("http_requests", "HTTP requests; 499: the client had left.", "path", "status")
        self._success = counter("request_success", "Answers that came to their end.", "finished_reason")
        self._failure = counter("request_failure", "Answers that had begun and did not, by the error's code.", "code")
        self._prompt = counter("prompt_tokens", "Tokens of prompts that were answered.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts looked for in pages of keys and values.")
        self._hits = counter("prefix_cache_hits", "Those that were there.")
        self._first = histogram("time_to_first_token_seconds", "From the whole request to an answer's first token.")
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self._whole = histogram("e2e_request_latency_seconds", "From the whole request to an answer's end.")
        self._queue = histogram("request_queue_time_seconds", "Before the engine took an answer in.")
        self._prefill = histogram("request_prefill_time_seconds", "Steps that an answer's prompt was computed in.")
        self._decode = histogram("request_decode_time_seconds", "From an answer's first token to its last.")
        self._num_prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", buckets=_TOKENS)
        self._num_generated = histogram("request_generation_tokens", "Tokens of an answer.", buckets=_TOKENS)
        rank = "encode_rank"
        self._wait = histogram("encoder_queue_wait_seconds", "What an image or clip waited for on its rank.", rank)
        self._preprocess = histogram("encoder_preprocess_seconds", "Decoding and cutting up one.", rank)
        self._forward = histogram("encoder_model_forward_seconds", "The vision tower's run that one was in.", rank)
        self._transfer = histogram("encoder_transfer_seconds", "Receiving and checking one's rows.", rank)
        self._bytes = counter("encoder_transfer_bytes", "Payload of rows that arrived.", rank)
        self._mm_queries = counter("mm_cache_queries", "Images and clips that rows were wanted of.", rank)
        self._mm_hits = counter("mm_cache_hits", "Those whose rows the encode rank had.", rank)
        self._of_ranks: list[Counter | Histogram] = [self._wait, self._preprocess, self._forward, self._transfer]
        self._of_ranks += [self._bytes, self._mm_queries, self._mm_hits]

    def answered(self, path: str, status: int) -> None:
        """An HTTP request was. `path`: of a route, so that there are few."""
        self._http.labels(path, status).inc()

    def first_token(self, seconds: float) -> None:
        self._generated.inc()
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._generated.inc()
        self._gap.observe(seconds)

    def failed(self, code: str) -> None:
        self._failure.labels(code).inc()

    def ended(self, reason: str, seconds: float, num_tokens: int, timings: RequestTimings) -> None:
        """An answer is whole, or all that was wanted of it. `seconds`: since the request had arrived."""
        self._success.labels(reason).inc()
        self._whole.observe(seconds)
        self._queue.observe(timings.queue / 1e3)
        self._prefill.observe(timings.prefill / 1e3)
        if num_tokens:  # else it is a vector
            self._num_generated.observe(num_tokens)
            self._decode.observe(timings.decode / 1e3)

    def prompted(self, num_tokens: int, timings: RequestTimings) -> None:
        """A prompt has been computed, with the images and clips in it."""
        self._prompt.inc(num_tokens)
        self._num_prompt.observe(num_tokens)
        if self._hides:
            return
        self._queries.inc(num_tokens)
        self._hits.inc(timings.cached_tokens)
        self.hits.update(tokens=num_tokens, cached_tokens=timings.cached_tokens)
        for item in timings.items:
            if item.encode_rank >= 0:  # else its rows were not asked for
                self._encoded(item)

    def _encoded(self, item: ItemTimings) -> None:
        rank = str(item.encode_rank)
        if rank not in self._ranks:
            self._forget_ranks(self._backend.rank_loads())
            rank = rank if len(self._ranks) < MAX_RANKS else "others"
        if rank != "others":
            self._ranks[rank] = time.monotonic()
        self._mm_queries.labels(rank).inc()
        self._mm_hits.labels(rank).inc(item.cached)
        self.hits.update(items=1, cached_items=int(item.cached))
        self._bytes.labels(rank).inc(item.transfer_bytes)
        self._transfer.labels(rank).observe(item.transfer / 1e3)
        self._wait.labels(rank).observe(item.queue / 1e3)
        if not item.cached:
            self._preprocess.labels(rank).observe(item.preprocess / 1e3)
            self._forward.labels(rank).observe(item.encode / 1e3)

    def _forget_ranks(self, keys: Iterable[RankKey]) -> None:
        """Those that left some time ago: what they did is in no series any more. `keys`: ranks that are there."""
        now, there = time.monotonic(), {str(rank) for role, rank in keys if role == "encode"}
        self._ranks |= dict.fromkeys(there & self._ranks.keys(), now)
        for rank in [rank for rank, seen_at in self._ranks.items() if now - seen_at >= GONE_S]:
            del self._ranks[rank]
            for metric in self._of_ranks:
                metric.remove(rank)

    async def show(self, request: Request) -> Response:
        """The route."""
        is_open = "application/openmetrics-text" in request.headers.get("accept", "")
        form = openmetrics if is_open else exposition
        async with self._making:  # one at a time; who waited mostly finds one that is new
            page = self._pages.get(is_open)
            if page is None or time.monotonic() >= page.good_until:
                self._loads.look()
                self._forget_ranks(self._loads.seen)
                started = time.monotonic()
                body = await asyncio.to_thread(form.generate_latest, self._registry)
                took = time.monotonic() - started
                page = self._pages[is_open] = _Page(body, started + took + min(REST * took, MAX_AGE_S))
        return Response(page.body, headers={"Content-Type": form.CONTENT_TYPE_LATEST})


@dataclass(frozen=True)
class _Page:
    body: bytes
    good_until: float


class _Loads:
    """What ranks said last, as they are asked for."""

    def __init__(self, backend: Backend, *, hides_cache_hits: bool) -> None:
        self._backend, self._hides = backend, hides_cache_hits
        self._is_ready, self.seen = False, dict[RankKey, Load | None]()

    def look(self) -> None:
        """On the event loop, which the ranks' connections are on."""
        self._is_ready, self.seen = self._backend.readiness().ready, dict(self._backend.rank_loads())

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("q3vl_ready", "1 if requests are served.")
        ready.add_metric([], self._is_ready)
        yield ready

        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"q3vl_{name}", text, labels=["role", "rank"])

        def counter(name: str, text: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"q3vl_{name}", text, labels=["role", "rank"])

        up = gauge("rank_up", "1 for a rank that the frontend hears of, 0 for one that is missing.")
        running = gauge("num_requests_running", "Answers with pages; on an encode rank items with a place.")
        waiting = gauge("num_requests_waiting", "Answers that wait for pages; items that wait for a place.")
        usage = gauge("kv_cache_usage_perc", "Part of the pages of keys and values that answers have, 1 for all.")
        steps = counter("engine_steps", "Turns of a language rank's engine.")
        preempted = counter("num_preemptions", "Answers that gave their pages up.")
        cached = gauge("encoder_cache_bytes", "Rows that an encode rank keeps.")
        items = counter("encoder_items", "Images and clips that went through a vision tower.")
        batches = counter("encoder_batches", "Runs of a vision tower.")
        for (role, number), load in self.seen.items():
            rank = [role, str(number)]
            up.add_metric(rank, load is not None)
            if load is None:
                continue
            running.add_metric(rank, load.running)
            waiting.add_metric(rank, load.waiting)
            if isinstance(load, LanguageLoad):
                usage.add_metric(rank, load.kv_pages_used / max(load.kv_pages, 1))
                steps.add_metric(rank, load.num_steps)
                preempted.add_metric(rank, load.num_preemptions)
            elif not self._hides:
                cached.add_metric(rank, load.cache_bytes)
                items.add_metric(rank, load.num_items)
                batches.add_metric(rank, load.num_batches)
        yield from (up, running, waiting, usage, steps, preempted, cached, items, batches)
