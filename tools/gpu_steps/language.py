"""The decoder at its real size: how fast, where the time goes, and its step as a CUDA graph."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.engine import Engine
from qwen3vl_disagg.engine.graphs import GraphedDecode
from qwen3vl_disagg.engine.runner import ModelRunner
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.model import Qwen3MoeForCausalLMWithDeepStack, use_kernels
from qwen3vl_disagg.protocol.messages import Tokens
from tools import bench_ceilings
from tools.bench_contestants.this_project import decode_stamps
from tools.bench_stats import decode_rate
from tools.gpu_steps.sizes import Sizes, difference, language_model, least_ms, make_engine, prompt, sizes_of, wait
from tools.gpu_steps.step import Check

PROFILED_STEPS = 3
MOST_REPLAYED = 0.02
"""Of the largest logit: a graph has more rows than the step, whose products may be summed in another order."""


def ceilings(check: Check) -> bench_ceilings.Rates | None:
    """What the step `machine` measured; None where it did not run."""
    path = check.out / "machine.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if not {"copy_GB_s", "matmul_TFLOP_s"} <= found.keys():
        return None
    return bench_ceilings.Rates(found["copy_GB_s"] * 1e9, found["matmul_TFLOP_s"] * 1e12)


def speed(check: Check) -> None:
    sizes, rates = sizes_of(check), ceilings(check)
    started = time.monotonic()
    model = language_model(check)
    wait(check.device)
    check.say(weights_s=time.monotonic() - started)
    started = time.monotonic()
    engine = make_engine(check, model)
    counts = engine.runner.compiled.counts.graphs if engine.runner.compiled else 0
    check.say(start_s=time.monotonic() - started, graphs=counts, pages=engine.room.num_pages)
    text = sizes.config.text
    for batch in sizes.batches:
        with check.part(f"decode_{batch}"):
            prompts = [prompt(sizes, sizes.context, 100 * batch + i) for i in range(batch)]
            rate = decode_rate(decode_stamps(engine, prompts, sizes.new_tokens))
            most = None
            if rates is not None:
                work = bench_ceilings.decode_step(text, batch=batch, context=sizes.context)
                most = batch / work.seconds(rates)
            check.say(**{f"decode_{batch}": shares(rate, most, "tokens/s")})
    for length in sizes.prefills:
        with check.part(f"prefill_{length}"):
            decode_stamps(engine, [prompt(sizes, length, 1)], 1)
            started = time.perf_counter()
            [[stamp]] = decode_stamps(engine, [prompt(sizes, length, 2)], 1)
            rate = length / (stamp - started)
            most = length / bench_ceilings.prefill(text, tokens=length).seconds(rates) if rates else None
            check.say(**{f"prefill_{length}": shares(rate, most, "tokens/s")})
    if check.needs_gpu("memory"):
        check.say(memory={"most GiB": torch.cuda.max_memory_allocated() / 2**30})


def shares(value: float, most: float | None, unit: str) -> dict[str, Any]:
    """A speed beside its ceiling."""
    found: dict[str, Any] = {unit: value}
    return found if most is None else {**found, "ceiling": most, "share": value / most}


def start_decoding(engine: Engine, sizes: Sizes, batch: int) -> None:
    """`batch` requests, each with its first token."""
    sampling = SamplingParams(max_new_tokens=sizes.new_tokens, temperature=0.0, ignore_eos=True)
    for number in range(batch):
        engine.add(f"{batch}-{number}", prompt(sizes, sizes.context, 7000 + 100 * batch + number), [], sampling)
    waiting = {f"{batch}-{number}" for number in range(batch)}
    while waiting:
        waiting -= {event.request_id for event in engine.step() if isinstance(event, Tokens)}


def profile(check: Check) -> None:
    """Some decode steps under the profiler, and a trace to look at."""
    sizes = sizes_of(check)
    engine = make_engine(check, language_model(check))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not check.is_dry:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for batch in (sizes.batches[0], sizes.batches[-1]):
        with check.part(f"batch_{batch}"):
            start_decoding(engine, sizes, batch)
            wait(check.device)
            with torch.profiler.profile(activities=activities) as profiled:
                started = time.perf_counter()
                for _ in range(PROFILED_STEPS):
                    engine.step()
                wait(check.device)
                seconds = time.perf_counter() - started
            check.say(**{f"batch_{batch}": {"step ms": seconds / PROFILED_STEPS * 1e3}})
            save_trace(profiled, check.out / f"trace_{batch}.json.gz")
            if check.needs_gpu(f"kernels_{batch}"):
                check.say(**{f"kernels_{batch}": kernels_of(profiled, seconds)})
            for number in range(batch):
                engine.cancel(f"{batch}-{number}")


def save_trace(profiled: torch.profiler.profile, path: Path) -> None:
    plain = path.with_suffix("")
    profiled.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(path, "wb") as target:
        shutil.copyfileobj(source, target)
    plain.unlink()


def kernels_of(profiled: torch.profiler.profile, seconds: float) -> dict[str, Any]:
    """Launches a step, the share of the time in which a kernel ran, the five that took longest."""
    times: dict[str, list[float]] = {}
    for event in profiled.events():
        if event.device_type == torch.profiler.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.device_time / 1e6)
    longest = sorted(times, key=lambda name: -sum(times[name]))[:5]
    busy = sum(map(sum, times.values()))
    return {
        "launches a step": sum(map(len, times.values())) / PROFILED_STEPS,
        "busy share": busy / seconds,
        "longest ms a step": {name[:60]: sum(times[name]) / PROFILED_STEPS * 1e3 for name in longest},
    }


def capture(check: Check) -> None:
    """The engine's captured step beside the one from Python. Rehearsed on the simulated device of the tests."""
    model = language_model(check)
    if not check.is_dry:
        capture_all(check, model)
        return
    from tests.support.simcuda import simulated, to_device

    with simulated() as watch:
        to_device(model, watch)
        capture_all(check, use_kernels(model))
    if watch.problems:
        raise RuntimeError(f"the simulated device refuses: {watch.problems}")


def capture_all(check: Check, model: Qwen3MoeForCausalLMWithDeepStack) -> None:
    started = time.monotonic()
    runner = make_engine(check, model, compile=True).runner
    captured = runner.captured
    if not isinstance(captured, GraphedDecode):
        raise RuntimeError("decode steps were not captured; the log says why")
    check.say(start_s=time.monotonic() - started, sizes=captured.sizes)
    for batch in sizes_of(check).captured:
        with check.part(f"graph_{batch}"), torch.inference_mode():
            capture_batch(check, runner, captured, batch)


def capture_batch(check: Check, runner: ModelRunner, captured: GraphedDecode, batch: int) -> None:
    """One step of `batch` sequences with contexts of their own: from Python, then replayed."""
    sequences = decoding(sizes_of(check), runner, batch)
    for pool in (pool for pair in runner.caches for pool in pair):
        pool[: runner.num_pages * runner.page_size].normal_(0, 0.5)
    step = partial(runner.decode, sequences)
    runner.captured = None
    expected = step().clone()
    check.say(**{f"step_{batch}": {"step ms": least_ms(check, step), "again": difference(step(), expected)}})
    runner.captured = captured
    num_rows = captured.size_for(batch, None)
    if num_rows is None:
        raise RuntimeError(f"no step of {batch} rows was captured")
    replayed = difference(step(), expected)
    replay_ms = least_ms(check, partial(captured.graphs.replay, num_rows))
    found = {"rows": num_rows, "step ms": least_ms(check, step), "replay ms": replay_ms, "difference": replayed}
    check.say(**{f"graph_{batch}": found})
    if not replayed <= MOST_REPLAYED:  # nor NaN
        raise RuntimeError(f"the replayed step differs from Python's by {replayed:.3g} of the largest logit")


def decoding(sizes: Sizes, runner: ModelRunner, batch: int) -> list[Sequence]:
    """So many, each with pages of its own and a token that is not yet in them."""
    sequences, width = list[Sequence](), sizes.context // runner.page_size + 1
    if batch * width > runner.num_pages:
        raise RuntimeError(f"{batch} contexts of {width} pages, and there are {runner.num_pages}")
    for number in range(batch):
        ids = prompt(sizes, sizes.context - number % 7, number)
        positions = torch.arange(len(ids)).expand(3, -1)
        sequence = Sequence(str(number), ids, [], SamplingParams(), positions=positions, delta=0, seed=0)
        sequence.num_cached = len(ids)
        sequence.pages += range(number * width, (number + 1) * width)
        sequence.generated.append(1 + number)
        sequences.append(sequence)
    return sequences
