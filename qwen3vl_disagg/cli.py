"""`qwen3vl-disagg`: one-off generation, sizing, simulation. `python -m qwen3vl_disagg` is the same."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import tyro

from qwen3vl_disagg.checkpoint.convert import ConvertOptions, convert_options, run_convert
from qwen3vl_disagg.core.errors import CheckpointError, DisaggError, InputError
from qwen3vl_disagg.core.settings import EncodeOptions, ModelOptions
from qwen3vl_disagg.parallel.plan_command import PlanOptions, plan_options, run_plan


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(EncodeOptions, ModelOptions):
    """Answer one question, or a file of them, in one process.

    The user turn is the images in order, then the videos, then the prompt. Sampling values that are not given come
    from the checkpoint.
    """

    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Image file; repeat for several."""
    video: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Video file; repeat for several. Needs the extra `video`."""
    prompt: str | None = None
    """The question."""
    messages: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """A conversation in OpenAI chat form, in place of --image, --video and --prompt."""
    batch: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """One JSON object a line (`messages`, or `images` and `prompt`): one JSON result a line."""
    system: str | None = None
    """System turn before the question."""
    tools: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Functions that the model may call: a list in OpenAI form."""
    max_new_tokens: int = 128
    min_tokens: int = 0
    """No end token and no stop string before that many tokens."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    """Leave out tokens less likely than this share of the most likely one's probability."""
    presence_penalty: float = 0.0
    """From -2 to 2, as OpenAI's; likewise --frequency-penalty."""
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    """Over prompt and answer, as in transformers; 1 is none."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """The answer ends before this text; repeat for several."""
    seed: int | None = None
    """The same seed gives the same answer."""
    ignore_eos: bool = False
    """Ban the end tokens, so that exactly --max-new-tokens come."""
    logprobs: int | None = None
    """Give each token's log probability and this many alternatives (with --json or --batch)."""
    json: bool = False
    """Print one JSON object in place of text."""


def read_messages(options: GenerateOptions) -> list[Any]:
    """The conversations that the options name, in OpenAI form. InputError naming file and line for anything odd."""
    given = [name for name in ("prompt", "messages", "batch") if getattr(options, name) is not None]
    if len(given) != 1:
        raise InputError(f"give exactly one of --prompt, --messages and --batch, got {given or 'none'}")
    if options.prompt is not None:
        images, videos = list(map(str, options.image)), list(map(str, options.video))
        return [_conversation(images, videos, options.prompt, options.system)]
    if options.image or options.video or options.system:
        raise InputError("--image, --video and --system go with --prompt only")
    if options.messages is not None:
        return [_parse_json(_read(options.messages), str(options.messages))]
    assert options.batch is not None
    lines = [(n, line) for n, line in enumerate(_read(options.batch).splitlines(), 1) if line.strip()]
    return [_batch_entry(line, f"{options.batch}, line {n}", options.batch.parent) for n, line in lines]


def read_tools(options: GenerateOptions) -> list[Any]:
    """The functions of --tools. InputError naming the place of whatever is wrong."""
    if options.tools is None:
        return []
    from qwen3vl_disagg.processing import parse_tools

    return parse_tools(_parse_json(_read(options.tools), str(options.tools)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{where}: not JSON: nested too deeply") from error


def _conversation(images: list[str], videos: list[str], prompt: str, system: str | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    parts += [{"type": "video_url", "video_url": {"url": video}} for video in videos]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
    return ([{"role": "system", "content": system}] if system is not None else []) + [turn]


def _batch_entry(line: bytes, where: str, folder: Path) -> Any:
    entry = _parse_json(line, where)
    if isinstance(entry, dict) and "messages" in entry:
        return entry["messages"]
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise InputError(f"{where}: needs `messages`, or `prompt` with optional lists `images` and `videos`")
    images, videos = (_files(entry.get(key, []), f"{where}: `{key}`", folder) for key in ("images", "videos"))
    return _conversation(images, videos, entry["prompt"], entry.get("system"))


def _files(names: Any, where: str, folder: Path) -> list[str]:
    """Names relative to the batch file."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} must be a list of file names")
    return [str(folder / name) for name in names]


def generate(options: GenerateOptions) -> int:
    """Run the command; returns the exit status."""
    conversations, tools = read_messages(options), read_tools(options)
    from qwen3vl_disagg.media.decoder import MediaDecoder

    decoder = MediaDecoder()
    if options.image or options.video or options.prompt is None:
        decoder.warm_up()  # while the engine is imported and the weights are read
    from qwen3vl_disagg.checkpoint.hub import model_name
    from qwen3vl_disagg.engine.llm import LLM, tokens_per_second  # torch and the engine load here, not for --help
    from qwen3vl_disagg.processing import GenerationDefaults

    defaults: GenerationDefaults
    llm = LLM(
        options.model,
        dtype=options.dtype,
        device=options.device,
        compile=options.compile,
        quantize=options.quantize,
        progress=sys.stderr.isatty(),
        video_outer_wrapper=options.video_outer_wrapper,
        image_resize=options.image_resize,
        decoder=decoder,
        encode_options=options,
    )
    print(f"model {model_name(llm.folder)} on {llm.device}", file=sys.stderr)
    defaults = llm.processor.generation
    sampling = defaults.sampling(
        max_new_tokens=options.max_new_tokens,
        min_tokens=options.min_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
        logprobs=options.logprobs,
    )
    plain = not options.json and options.batch is None

    is_thinking = False

    def on_text(_: int, piece: str) -> None:
        nonlocal is_thinking
        if is_thinking:
            print(file=sys.stderr)
            is_thinking = False
        print(piece, end="", flush=True)

    def on_reasoning(_: int, piece: str) -> None:
        nonlocal is_thinking
        is_thinking = True
        print(piece, end="", flush=True, file=sys.stderr)

    started = time.monotonic()
    results = llm.chat_each(
        conversations,
        sampling,
        tools=tools,
        on_text=on_text if plain else None,
        on_reasoning=on_reasoning if plain else None,
    )
    if is_thinking:
        print(file=sys.stderr)
    status = 0
    for n, result in enumerate(results, 1):
        if isinstance(result, DisaggError):
            status = max(status, _report(result, prefix=f"{options.batch}, entry {n}: " if options.batch else ""))
            if options.batch is not None:
                error = {"message": str(result), "param": getattr(result, "param", None), "code": result.code}
                print(msgspec.json.encode({"error": error}).decode())
        elif plain:
            if result.text or not result.tool_calls:
                print()
            for call in result.tool_calls or []:
                print(msgspec.json.encode(call.function).decode())
        else:
            print(msgspec.json.encode(result).decode())
        if not isinstance(result, DisaggError):
            for number, item in enumerate(result.timings.items, 1):
                if item.note:
                    print(f"note: image or clip {number}: {item.note}", file=sys.stderr)
    answers = [result for result in results if not isinstance(result, DisaggError)]
    if answers:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        count = sum(len(result.token_ids) for result in answers)
        rate = tokens_per_second(answers, started)
        print(f"{count} tokens, {rate:.1f} tokens/s, peak memory {peak:.2f} GiB", file=sys.stderr)
    if plain and answers:
        from qwen3vl_disagg.core.waterfall import waterfall

        print(waterfall(answers[0].timings), file=sys.stderr)
    return status


def _report(error: DisaggError, prefix: str = "") -> int:
    """One line on stderr; the exit status that fits: 2 for bad input, 1 else."""
    is_input = isinstance(error, (InputError, CheckpointError)) and getattr(error, "status", 400) < 500
    param = getattr(error, "param", None)
    print(f"error: {prefix}{f'{param}: ' if param else ''}{error}", file=sys.stderr)
    return 2 if is_input else 1


def main() -> NoReturn:
    """Entry point of the command."""
    commands: dict[str, Any] = {
        "generate": _generate_options,
        "plan": plan_options,
        "convert": convert_options,
        "simulate": _simulate_options,
        "faults": _faults,
        "version": _version,
    }
    options = tyro.extras.subcommand_cli_from_dict(commands, prog="qwen3vl-disagg", config=(tyro.conf.OmitArgPrefixes,))
    try:
        match options:
            case GenerateOptions():
                sys.exit(generate(options))
            case PlanOptions():
                sys.exit(run_plan(options))
            case ConvertOptions():
                sys.exit(run_convert(options))
            case SimulateOptions():
                sys.exit(run_simulation(options))
        sys.exit(0)
    except DisaggError as error:
        sys.exit(_report(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _generate_options(options: GenerateOptions) -> GenerateOptions:
    """Answer one question, or a file of them, in one process."""
    return options


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Run the transfer's state machines under a virtual clock and network, with faults, and check every invariant."""

    schedules: int = 1000
    """How many fault schedules to run."""
    seed: int = 0
    first: int = 0
    """Number of the first schedule, to replay one."""
    mutant: str | None = None
    """Plant this bug first; `list` names them all."""
    table: bool = False
    """Print how often each fault hit a session in each state, as a Markdown table."""
    json: bool = False
    """Print one JSON object in place of text."""


def _simulate_options(options: SimulateOptions) -> SimulateOptions:
    """Run the transfer's state machines under a virtual clock and network, with faults, and check every invariant."""
    return options


def run_simulation(options: SimulateOptions) -> int:
    """Run the command; 0 when clean, 1 at the first violation."""
    if options.schedules < 1 or options.first < 0:
        raise InputError("--schedules must be at least 1 and --first at least 0", param="schedules")
    from tqdm import tqdm

    from qwen3vl_disagg.disagg.simulation.runner import fault_table, mutant_names, simulate

    if options.mutant == "list":
        print("\n".join(mutant_names()))
        return 0
    with tqdm(total=options.schedules, unit="schedule", disable=not sys.stderr.isatty()) as bar:
        result = simulate(options.schedules, options.seed, options.mutant, first=options.first, on_progress=bar.update)
    rate = result.events / max(result.seconds, 1e-9)
    figures: dict[str, Any] = {
        "schedules": result.schedules,
        "events": result.events,
        "violations": 0 if result.violation is None else 1,
        "events_per_second": round(rate),
    }
    if result.others:
        passed_over = ", ".join(f"{name} {count} times" for name, count in sorted(result.others.items()))
        print(f"passed over, as this bug does not name them: {passed_over}", file=sys.stderr)
    if result.violation is not None:
        print(f"violation: {result.violation.violation}\nreplay: {result.replay}", file=sys.stderr)
        figures |= {"violation": result.violation.violation, "replay": result.replay}
    if options.table:
        print(fault_table(result))
    if options.json:
        print(msgspec.json.encode(figures).decode())
    else:
        print(
            f"{result.schedules} schedules, {result.events} events, {figures['violations']} violations, "
            f"{rate:,.0f} events/s; {result.answered} requests answered, {result.failed} ended with a typed error"
        )
    return 0 if result.violation is None else 1


def _faults() -> None:
    """List the points at which Q3VL_FAULT=point:nth:kill|stop|raise makes a rank fail."""
    from qwen3vl_disagg.core.faults import POINTS

    for name, about in POINTS.items():
        print(f"{name:22} {about}")


def _version() -> None:
    """Print the version."""
    from importlib.metadata import version

    print(version("qwen3vl-disagg"))


if __name__ == "__main__":
    main()
