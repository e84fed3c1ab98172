"""Requests that are given up, in every stage, leave nothing in the engine, the transfer or the router."""

from __future__ import annotations

import random
import time
from collections import Counter, deque

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.core.spans import MAX_SPANS
from qwen3vl_disagg.engine.engine import EngineOptions
from qwen3vl_disagg.processing import AnswerParts, Prompt
from qwen3vl_disagg.protocol.session import HELD, RECEIVING, WAITING
from tests.support.held import grown, look
from tests.support.local import WAIT_S, settled
from tests.support.scenes import ask_scenes

STAGES = ("queued", "encoding", "transferring", "prefilling", "decoding", "streaming")
UNDER_WAY = 8
"""More than run at once, so that some are queued."""
BOUNDED = {"core.spans.ring": 8 * MAX_SPANS, "qwen3vl_disagg.core.spans.Span": MAX_SPANS}
"""A span names the requests of a step, also those of the tests before."""
CHILDREN = 4
"""Of anything: the two children that decode may come late, each with two pipes and its last job."""
QUICK, MANY = 150, 10_000


@pytest.fixture(scope="module")
def llm() -> LLM:
    options = EngineOptions(max_running=4, prefix_cache=False, chunk_tokens=32)
    return LLM(engine_options=options, encode_options=EncodeOptions(embedding_cache_mib=0))


@pytest.fixture(scope="module")
def prompts(llm, tmp_path_factory) -> list[Prompt]:
    """Half of them with images."""
    asked = [one.messages() for one in ask_scenes(tmp_path_factory.mktemp("scenes"), seed=3, count=8)]
    asked += [[{"role": "user", "content": f"{number}. " + "What is in it? " * 20}] for number in range(8)]
    return [llm.processor.prepare(messages) for messages in asked]


class Given:
    """Requests that are under way, and one after another is given up."""

    def __init__(self, llm: LLM, prompts: list[Prompt], seed: int) -> None:
        self.llm, self.prompts, self.rng = llm, prompts, random.Random(seed)
        self.stages = Counter[str]()
        self.num_given_up = 0
        self._names: deque[str] = deque()
        self._streamed: dict[str, int] = {}
        self._over: set[str] = set()

    def begin(self) -> None:
        prompt, name = self.rng.choice(self.prompts), ""
        sampling = SamplingParams(max_new_tokens=40, n=self.rng.choice([1, 1, 1, 2]), ignore_eos=True, temperature=0.0)
        tokenizer, eos_ids = self.llm.processor.tokenizer, self.llm.engine.eos_ids
        parts = [AnswerParts(tokenizer, eos_ids, sampling, prompt.token_ids) for _ in range(sampling.n)]

        def emit(_: object) -> None:
            self._streamed[name] = self._streamed.get(name, 0) + 1

        name = self.llm._requests.begin(prompt, parts, sampling, emit=emit, done=lambda _: self._over.add(name))
        self._names.append(name)

    def stage(self, name: str) -> str:
        """Where the request is; its rows are moved by another thread, which may be further meanwhile."""
        if self._streamed.get(name, 0) > 3:
            return "streaming"
        if self._streamed.get(name):
            return "decoding"
        scheduler = self.llm.engine.scheduler
        if not any(sequence.request_id == name for sequence in scheduler.admitted.values()):
            return "queued"
        sessions = self.llm.transfer.links.sessions.requests.get(name)
        states = [] if sessions is None else [session.state for session in sessions.sessions]
        if RECEIVING in states or HELD in states:
            return "transferring"
        router = self.llm.transfer._router._requests.get(name)
        is_encoding = router is not None and any(item.state in ("waiting", "encoding") for item in router.items)
        return "encoding" if is_encoding or WAITING in states else "prefilling"

    def give_up(self) -> None:
        begun = [name for name in self._names if self.stage(name) != "queued"]
        name = self.rng.choice(begun if begun and self.rng.random() < 0.7 else list(self._names))
        self._names.remove(name)
        if name not in self._over:
            self.stages[self.stage(name)] += 1
            self.llm._requests.give_up([name])
            self.num_given_up += 1
        self._over.discard(name)
        self._streamed.pop(name, None)

    def run(self, count: int) -> None:
        """Give up so many."""
        goal = self.num_given_up + count
        while self.num_given_up < goal:
            while len(self._names) < UNDER_WAY:
                self.begin()
            for _ in range(self.rng.choice([0, 0, 1, 1, 2])):
                self.llm._requests.step()
            if self.rng.random() < 0.3:
                time.sleep(0.002 * self.rng.random())  # the other thread gets on
            self.give_up()
        while self._names:
            self.give_up()


def check(llm: LLM, prompts: list[Prompt], warm_up: int, count: int) -> Counter[str]:
    """The stages that were seen."""

    def holds() -> Counter[str]:
        end = time.monotonic() + WAIT_S
        is_idle = False
        while not is_idle and time.monotonic() < end:
            is_idle = settled(llm, 0.1)
            llm._requests._steps.post(lambda _: None)  # else a step would wait for something to do
            llm._requests.step()  # recalls, and what the tower had begun, are answered by the thread that steps
        assert is_idle
        return look(requests=llm._requests)

    given = Given(llm, prompts, seed=count)
    given.run(warm_up)
    before = holds()
    given.stages.clear()
    given.run(count)
    after = holds()
    pool, allocator = llm.engine.scheduler.pool, llm.transfer.receiver.buffers.allocator
    assert llm.engine.is_empty
    assert pool.num_free == pool.num_pages
    assert allocator.is_idle
    assert grown(before, after, BOUNDED, slack=CHILDREN) == []
    return given.stages


def test_cancelled_requests_leave_nothing_behind(llm, prompts):
    stages = check(llm, prompts, QUICK // 2, QUICK)
    assert set(stages) == set(STAGES), stages


@pytest.mark.acceptance
@pytest.mark.parametrize("quarter", range(4))
def test_ten_thousand_cancelled_requests_leave_nothing_behind(llm, prompts, quarter):
    """Of one `LLM`; each quarter by itself, so that none takes too long."""
    stages = check(llm, prompts, QUICK, MANY // 4 + quarter)
    print(f"given up in each stage: {dict(stages)}")
    assert min(stages[stage] for stage in STAGES) >= 30, stages
