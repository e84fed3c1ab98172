"""This project beside `transformers`, vLLM and llama.cpp on one checkpoint: contestants take turns in every round."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.core.errors import CheckpointError
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.plan.presets import PRESETS
from tools.bench_contestants.client import ContestantError, Process
from tools.bench_contestants.llama_build import NO_BUILD, named_build
from tools.bench_contestants.worker import Setup
from tools.bench_engine_plan import MACHINE, Plan, Record, run
from tools.bench_machine import conclude, machine_facts, machine_line, table
from tools.checkpoints import RANDOM_PRESETS, write_checkpoint, write_random_checkpoint
from tools.make_checkpoint import write_small_tokenizer

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
CEILING_COLOUR = "#dddddd"
LOAD_S = 1200.0
Name = Literal["this", "this-compiled", "this-int8", "transformers", "vllm", "vllm-compiled", "llama.cpp"]
MODULES = {
    MACHINE: "machine_rates",
    "this": "this_project",
    "transformers": "hf_transformers",
    "vllm": "vllm_cpu",
    "llama.cpp": "llama_cpp",
}
"""By a contestant's name up to its first dash."""
VARIANTS = {
    "this-compiled": {"compile": "on"},
    "this-int8": {"quantize": "int8"},
    "vllm": {"compile": "off"},
    "vllm-compiled": {"compile": "on"},
}


def make_folder(preset: str, folder: Path, std: float = 0.02) -> bool:
    """Write the preset's checkpoint; of a published shape everything but the weights. Whether they are to be made."""
    if preset in RANDOM_PRESETS:
        config = write_random_checkpoint(folder, RANDOM_PRESETS[preset], seed=0, std=std, max_pixels=1 << 20)
    else:
        config = PRESETS[preset]
        write_checkpoint(folder, config, {})
    write_small_tokenizer(folder, config)
    return preset not in RANDOM_PRESETS


def folder_to_serve(stack: ExitStack, preset: str) -> Path:
    """The preset's checkpoint in a folder that goes with `stack`. SystemExit for one whose weights are not written."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) / preset
    if make_folder(preset, folder):
        raise SystemExit(f"--preset {preset}: its weights are not written to a folder, so it cannot be served")
    return folder


def environment(name: str, setup: Setup, python: Path, wait: str = "default") -> dict[str, str]:
    """Threads, and no network; what the caller has set in its own environment stays.

    vLLM gets what its manual advises: its threads bound to cores, and Intel's OpenMP library where its environment has
    it.
    """
    cores = sorted(os.sched_getaffinity(0))[: setup.threads]
    env = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if wait != "default":
        env["OMP_WAIT_POLICY"] = wait.upper()
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if name.startswith("vllm") and openmp.is_file():
        env["LD_PRELOAD"] = str(openmp)
    return {**env, **os.environ, "OMP_NUM_THREADS": str(setup.threads)}


def start(name: str, setup: Setup, python: Path, wait: str) -> Process:
    """A contestant's process; it loads while others may be loading too."""
    module = f"tools.bench_contestants.{MODULES[name.partition('-')[0]]}"
    mine = replace(setup, **VARIANTS.get(name, {}))  # type: ignore[arg-type]
    return Process(name, [str(python), "-m", module], mine, environment(name, mine, python, wait))


def weight_bytes(config: ModelConfig, facts: dict[str, Any]) -> float:
    """Bytes of one weight, as the contestant holds it."""
    return 1 if facts.get("quantize") == "int8" else {"float32": 4, "bfloat16": 2}[config.dtype]


def check(contestants: Sequence[str], plan: Plan, model: Path | None, preset: str) -> None:
    """SystemExit for what cannot be measured."""
    if plan.rounds < 1 or not contestants or not plan.batches or min(plan.batches) < 1:
        raise SystemExit("need at least one round, one contestant, and batches of at least 1")
    if plan.new_tokens < 3 or plan.prompt_tokens < 1 or plan.prefill_tokens < 1:
        raise SystemExit(f"need prompts, and at least 3 new tokens to time the steps between, got {plan.new_tokens}")
    if model is None and preset not in {**RANDOM_PRESETS, **PRESETS}:
        raise SystemExit(f"--preset {preset}: one of {', '.join([*RANDOM_PRESETS, *PRESETS])}")


def engine(
    rounds: int = 5,
    contestants: tuple[Name, ...] = ("this", "this-compiled", "transformers", "vllm", "vllm-compiled", "llama.cpp"),
    batches: tuple[int, ...] = (1, 8, 32),
    preset: str = "mid",
    model: Path | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    prefill_tokens: int = 1024,
    image_side: int = 448,
    threads: int = 2,
    wait: Literal["default", "passive"] = "default",
    device: Literal["cpu", "cuda"] = "cpu",
    compile: Literal["auto", "on", "off"] = "auto",
    quantize: Literal["none", "int8"] = "none",
    vllm_python: Path | None = None,
    llama_cpp: Path | None = None,
    picture: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Decode, prefill and vision speed beside the ceilings, contestants in turns; docs/benchmarks.md.

    Args:
        rounds: Rounds that count; one more before them warms up.
        contestants: Who takes part. Who cannot be started is left out, with the reason.
        batches: How many requests decode at once.
        preset: Random weights: those of tools/make_checkpoint.py are written to a temporary folder, the published
            shapes (30b-a3b, ..) are made on the device.
        model: A checkpoint folder instead.
        prompt_tokens: Length of a prompt that is decoded from.
        new_tokens: Tokens for each request; end tokens are ignored.
        prefill_tokens: Length of the prompt whose prefill is timed.
        image_side: Height and width of the image in pixels.
        threads: Threads of each contestant; only one works at a time.
        wait: How threads of OpenMP wait for work. By default they spin for a moment, which is faster on free cores and
            much slower beside other programs; `passive` ones sleep at once.
        device: Where all of them run.
        compile: Of contestant `this`.
        quantize: Of contestant `this`.
        vllm_python: Python of an environment that has vLLM. Default: $VLLM_PYTHON.
        llama_cpp: Folder in which llama.cpp was built. Default: $LLAMA_CPP.
        picture: Folder for the picture.
        as_json: Print the JSON line only.
    """
    plan = Plan(
        batches=batches,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens=prefill_tokens,
        image_side=image_side,
        rounds=rounds,
    )
    check(contestants, plan, model, preset)
    machine = machine_facts()
    vllm_python = vllm_python or (Path(os.environ["VLLM_PYTHON"]) if os.environ.get("VLLM_PYTHON") else None)
    with ExitStack() as stack:
        is_random = False
        if model is None:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) / preset
            is_random = make_folder(preset, model)
        try:
            config = read_config(model)
        except CheckpointError as error:
            raise SystemExit(f"--model {model}: {error}") from None
        setup = Setup(
            folder=str(model),
            device=device,
            threads=threads,
            compile=compile,
            quantize=quantize,
            is_random=is_random,
            max_batch=max(batches),
            max_tokens=max(prefill_tokens, prompt_tokens + new_tokens) + 8,
            llama_cpp=str(named_build(llama_cpp) or ""),
        )
        processes, records, left_out = gather(stack, [MACHINE, *contestants], setup, vllm_python, wait)
        if MACHINE not in records or len(records) == 1:
            raise SystemExit("\n".join(f"{name}: {reason}" for name, reason in left_out.items()))
        run(plan, config, processes, records)
    result = assemble(plan, config, records) | {
        "bench": "engine",
        "machine": machine,
        "model": preset if is_random or model.name == preset else str(model.name),
        "threads": threads,
        "wait": wait,
        "left_out": left_out,
    }
    if picture is not None:
        print(draw(result, picture), file=sys.stderr)
    conclude(result, report(result), as_json)


def gather(
    stack: ExitStack, names: Sequence[str], setup: Setup, vllm_python: Path | None, wait: str
) -> tuple[dict[str, Process], dict[str, Record], dict[str, str]]:
    """Load one after another. Processes and records of those that are ready; why the others are left out."""
    processes: dict[str, Process] = {}
    records: dict[str, Record] = {}
    left_out: dict[str, str] = {}
    for name in names:
        python = vllm_python if name.startswith("vllm") else Path(sys.executable)
        if python is None:
            left_out[name] = "no environment with vLLM given (--vllm-python or VLLM_PYTHON)"
            continue
        if name == "llama.cpp" and not setup.llama_cpp:
            left_out[name] = NO_BUILD
            continue
        process = start(name, setup, python, wait)
        stack.callback(process.close)
        try:
            records[name] = Record(process.wait_loaded(LOAD_S))
            processes[name] = process
            print(f"{name}: {records[name].facts}", file=sys.stderr)
        except ContestantError as error:
            print(error, file=sys.stderr)
            left_out[name] = str(error).splitlines()[0]
            process.close()
    return processes, records, left_out


def assemble(plan: Plan, config: ModelConfig, records: dict[str, Record]) -> dict[str, Any]:
    """Figures and ceilings of all."""
    rates = records[MACHINE].best_rates(config.dtype)
    plain = weight_bytes(config, {})
    return {
        "rounds": plan.rounds,
        "dtype": config.dtype,
        "prompt_tokens": plan.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "prefill_tokens": plan.prefill_tokens,
        "image_side": plan.image_side,
        "rates": {
            "read_gb_s": rates.bytes_s / 1e9,
            "matmul_gflop_s": rates.flop_s / 1e9,
            "rounds": records[MACHINE].figures,
        },
        "ceiling": plan.ceilings(config, plain, rates),
        "contestants": {
            name: record.summary(plan.ceilings(config, weight_bytes(config, record.facts), rates))
            for name, record in records.items()
            if name != MACHINE
        },
    }


def unit(measurement: str) -> str:
    """Head of a column."""
    if measurement == "image":
        return "image ms"
    kind, _, batch = measurement.partition(" ")
    return f"{kind} tokens/s" + (f", batch {batch}" if batch else "")


def report(result: Mapping[str, Any]) -> str:
    """Markdown for people: figures with their part of the ceiling, then what the run got of the machine."""
    contestants, measurements, machine = result["contestants"], list(result["ceiling"]), result["machine"]
    rates = result["rates"]

    def cell(entry: Mapping[str, Any], measurement: str) -> str:
        return f"{entry['median'][measurement]:.0f} ({entry['of_ceiling'][measurement]:.0%})"

    figures = [["ceiling", *(f"{result['ceiling'][name]:.0f}" for name in measurements)]]
    figures += [[name, *(cell(entry, m) for m in measurements)] for name, entry in contestants.items()]
    spreads = [
        [name, *(f"{min(entry['rounds'][m]):.0f} to {max(entry['rounds'][m]):.0f}" for m in measurements)]
        for name, entry in contestants.items()
    ]
    shares = [
        [
            name,
            *(f"{entry[key]:.2f}" for key in ("cores", "idle_cores", "other_cores")),
            *(f"{entry[key]:,.0f} MB" for key in ("private_mb", "peak_mb")),
        ]
        for name, entry in contestants.items()
    ]
    left_out = [f"Left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n\n".join(
        [
            f"{machine_line(machine)}; {result['model']}, {result['dtype']}, {result['threads']} threads "
            f"({result['wait']} wait), "
            f"{result['rounds']} rounds; prompts of {result['prompt_tokens']} tokens and {result['new_tokens']} new "
            f"ones, prefill of {result['prefill_tokens']}, image of {result['image_side']} x {result['image_side']}",
            f"Ceilings stand on {rates['read_gb_s']:.1f} GB/s read and {rates['matmul_gflop_s']:.0f} GFLOP/s.",
            "Median (part of the ceiling):",
            table(["", *map(unit, measurements)], figures),
            "Least to greatest:",
            table(["", *map(unit, measurements)], spreads),
            "Cores busy during a contestant's measurements, and its memory:",
            table(["", "its own", "idle contestants", "other programs", "private", "peak resident"], shares),
            *left_out,
        ]
    )


def draw(result: Mapping[str, Any], folder: Path) -> Path:
    """Tokens/s of each contestant and batch, in front of the ceiling. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contestants = result["contestants"]
    panels = [name for name in result["ceiling"] if name != "image"] + ["image"]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 3.8))
    for axis, measurement in zip(axes, panels, strict=True):
        ceiling = result["ceiling"][measurement]
        for x, (colour, entry) in enumerate(zip(COLOURS, contestants.values(), strict=False)):
            values = entry["rounds"][measurement]
            median = entry["median"][measurement]
            axis.bar(x, median, width=0.7, color=colour)
            axis.plot([x, x], [min(values), max(values)], color="#333333", linewidth=1.2)
            axis.text(x, max(values), f"{median:.0f}", ha="center", va="bottom", fontsize=8)
        axis.axhline(ceiling, color="#333333", linestyle="--", linewidth=1)
        place = "least" if measurement == "image" else "ceiling"
        axis.text(len(contestants) - 0.5, ceiling, f"{place} {ceiling:.0f}", ha="right", va="bottom", fontsize=8)
        axis.set_title(unit(measurement), fontsize=9)
        axis.set_xticks(range(len(contestants)), contestants, rotation=55, ha="right", fontsize=8)
        axis.margins(y=0.12)
        axis.set_ylim(bottom=0)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "engine.png"
    figure.savefig(path, dpi=130)
    return path
