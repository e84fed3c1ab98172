"""The ways to an answer: in one process, or over HTTP from a server under torchrun."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from qwen3vl_disagg.core.settings import default_page_size
from qwen3vl_disagg.launch.trace import direct
from tools.bench_served import Served
from tools.places_parts.questions import MAX_TOKENS, Question
from tools.places_parts.verdicts import Said

CLIENTS = 8
DEADLINE_S = 300.0
METRICS_S = 3.0
"""Ranks tell their counts every second."""
FEW_PAGES = ("--page-size", "1", "--kv-cache-gib", "0.001", "--max-running", "16", "--prefix-cache", "off")
"""Room for about 520 tokens, a page each. What is computed again is not found."""
LONG = {
    "messages": [{"role": "user", "content": "List all cells."}],
    "temperature": 0,
    "max_tokens": 200,
    "ignore_eos": True,
}
"""What comes before some questions and wants a page with each token: it takes those of the last that came."""
NUM_LONG = 3

Ask = Callable[[Served, Question], Said]


@dataclass(frozen=True)
class Taken:
    """`trouble`: why the answers do not count as those of this route."""

    answers: list[Said]
    trouble: str = ""
    note: str = ""


@dataclass(frozen=True)
class Route:
    """`bound`: for near ties, logits. `is_exact`: another text is wrong; where it is not, it is only counted."""

    take: Callable[[Path, Sequence[Question]], Taken]
    dtype: str = "float32"
    bound: float = 1e-3
    is_exact: bool = True


# ---- in one process ----


def in_process(folder: Path, asked: Sequence[Question], *, dtype: str = "float32", quantize: str = "none") -> Taken:
    from qwen3vl_disagg import LLM
    from qwen3vl_disagg.core.errors import DisaggError
    from qwen3vl_disagg.core.requests import SamplingParams

    llm = LLM(folder, dtype=dtype, quantize=quantize, image_resize="pillow", progress=False)
    sampling = SamplingParams(max_new_tokens=MAX_TOKENS)
    results = llm.chat_each([question.messages() for question in asked], sampling)
    return Taken(
        [
            Said(trouble=str(result)) if isinstance(result, DisaggError) else Said(result.text, result.token_ids)
            for result in results
        ]
    )


# ---- over HTTP ----


def post(server: Served, question: Question) -> dict[str, Any]:
    body = {
        "messages": question.messages(),
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "return_token_ids": True,
    }
    return server.post(json.dumps(body).encode())


def said_in(body: dict[str, Any], trouble: str = "") -> Said:
    choice = body["choices"][0]
    return Said(choice["message"]["content"], choice["token_ids"], trouble)


def ask_once(server: Served, question: Question) -> Said:
    return said_in(post(server, question))


def ask_again_pages(server: Served, question: Question) -> Said:
    """The second answer; every full page of its prompt but the last token has to come from the prefix cache."""
    post(server, question)
    body = post(server, question)
    size, found = default_page_size(is_cuda=False), body["timings"]["cached_tokens"]
    most = (body["usage"]["prompt_tokens"] - 1) // size * size
    return said_in(body, "" if found == most else f"no hit: {found} tokens were cached, {most} could be")


def ask_again_rows(server: Served, question: Question) -> Said:
    """The second answer; the rows of every image have to come from the encode rank's cache."""
    post(server, question)
    body = post(server, question)
    missed = [n for n, item in enumerate(body["timings"]["items"]) if not item["cached"]]
    return said_in(body, f"no hit: images {missed} were encoded again" if missed else "")


def metric(server: Served, name: str) -> float:
    """Summed over ranks."""
    with direct.open(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def served(
    folder: Path,
    asked: Sequence[Question],
    *,
    world: int,
    encode: int,
    options: Sequence[str] = (),
    ask: Ask = ask_once,
    num_long: int = 0,
) -> Taken:
    """By CLIENTS at once, beside `num_long` others that ask LONG all the time. RuntimeError if the server does not come
    up, or has no answer for one of these."""
    is_over = threading.Event()

    def answer(question: Question) -> Said:
        try:
            return ask(server, question)
        except urllib.error.HTTPError as error:
            return Said(trouble=f"{error}: {error.read(2000).decode(errors='replace')}")
        except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
            return Said(trouble=repr(error))

    def keep_asking() -> None:
        try:
            while not is_over.is_set():
                server.post(json.dumps(LONG).encode())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RuntimeError(f"a long answer: {error!r}") from None

    fixed = ["--model", str(folder), "--dtype", "float32", "--image-resize", "pillow"]
    with (
        Served(world, [*fixed, "--encode-ranks", str(encode), *options]) as server,
        ThreadPoolExecutor(CLIENTS + num_long) as pool,
    ):
        others = [pool.submit(keep_asking) for _ in range(num_long)]
        try:
            answers = list(pool.map(answer, asked))
        finally:
            is_over.set()
        for other in others:
            other.result(DEADLINE_S)
        time.sleep(METRICS_S)
        preempted = metric(server, "q3vl_num_preemptions_total")
    return Taken(answers, note=f"{preempted:.0f} preemptions")


def preempted(folder: Path, asked: Sequence[Question]) -> Taken:
    taken = served(folder, asked, world=2, encode=1, options=FEW_PAGES, num_long=NUM_LONG)
    trouble = "nothing was preempted" if taken.note.startswith("0 ") else ""
    return Taken(taken.answers, trouble, taken.note)


ROUTES: dict[str, Route] = {
    "llm": Route(in_process),
    "one-plus-one": Route(partial(served, world=2, encode=1)),
    "two-plus-six": Route(partial(served, world=8, encode=2)),
    "hit": Route(partial(served, world=2, encode=1, ask=ask_again_pages)),
    "hit-rows": Route(partial(served, world=2, encode=1, options=("--prefix-cache", "off"), ask=ask_again_rows)),
    "preempted": Route(preempted),
    "bf16": Route(partial(in_process, dtype="bfloat16"), "bfloat16", bound=0.5),
    "int8": Route(partial(in_process, quantize="int8"), bound=0.5, is_exact=False),
}
