"""`qwen3vl-disagg generate`: everything that can be checked is checked before the weights are read, then one answer
after another is written as soon as it is there."""

from __future__ import annotations

import os
import re
import resource
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_disagg.core.errors import DisaggError, InputError, report
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.json_text import json_line, parse_json
from qwen3vl_disagg.core.requests import RequestTimings
from qwen3vl_disagg.core.sampling_params import OPTIONS, SamplingParams
from qwen3vl_disagg.options import GenerateOptions

if TYPE_CHECKING:
    from qwen3vl_disagg.processing import GenerationDefaults

_MAX_LINE = 1 << 28
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BOM = b"\xef\xbb\xbf"
_URL = re.compile(r"(data|file|https?|ftp):", re.IGNORECASE)
_FETCHED = re.compile(r"(https?|ftp):", re.IGNORECASE)
ENTRY_KEYS = {
    "messages": "messages",
    "prompt": "prompt",
    "system": "system",
    "images": "images",
    "image": "images",
    "videos": "videos",
    "video": "videos",
}
"""What a line of --batch may say -> what it means."""


class Generation:
    """One run of the command. Making it checks the arguments (InputError) and loads the model."""

    def __init__(self, options: GenerateOptions) -> None:
        self._options, self._printer = options, Printer()
        self._conversations, self._tools = conversations(options), read_tools(options)
        from qwen3vl_disagg.processing import GenerationDefaults

        sampling_of(options, GenerationDefaults(frozenset()))
        from qwen3vl_disagg.media.decoding import MediaDecoder

        decoder = MediaDecoder()
        if options.image or options.video or options.prompt is None:
            decoder.warm_up()  # while the engine is imported and the weights are read
        from qwen3vl_disagg.checkpoint.download import model_name
        from qwen3vl_disagg.llm.llm import LLM

        self._llm = LLM(
            **vars(options.model),
            progress=sys.stderr.isatty(),
            decoder=decoder,
            encode_options=options.encode,
        )
        room = self._llm.engine.room
        self._printer.note(f"model {model_name(self._llm.folder)} on {self._llm.device}, {room}")
        room.warn_of_images(self._llm.processor.image.max_rows)

    def run(self) -> int:
        """Returns the exit status."""
        options, batch = self._options, self._options.batch
        printer, is_plain = self._printer, not options.json and batch is None
        started, status, num_tokens, last = time.monotonic(), 0, 0, None
        results = self._llm.chat_iter(
            self._conversations,
            sampling_of(options, self._llm.processor.generation),
            tools=self._tools,
            on_text=printer.text if is_plain else None,
            on_reasoning=printer.reasoning if is_plain else None,
        )
        for n, result in enumerate(results, 1):
            if isinstance(result, DisaggError):
                status = max(status, report(result, prefix=f"{batch}, entry {n}: " if batch else ""))
                if batch is not None:
                    error = {"message": str(result), "param": getattr(result, "param", None), "code": result.code}
                    printer.json({"error": error})
                continue
            num_tokens, last = num_tokens + len(result.token_ids), result
            if is_plain:
                printer.end(result)
            else:
                printer.json(result)
            for number, item in enumerate(result.timings.items, 1):
                if item.note:
                    printer.note(f"note: image or clip {number}: {item.note}")
        if last is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            rate = num_tokens / max(time.monotonic() - started, 1e-9)
            printer.note(f"{num_tokens} tokens, {rate:.1f} tokens/s, peak memory {peak:.2f} GiB")
        if is_plain and last is not None:
            printer.note(waterfall(last.timings))
        return status


def sampling_of(options: GenerateOptions, defaults: GenerationDefaults) -> SamplingParams:
    """InputError for a value out of bounds."""
    given = {name: getattr(options, name) for name, option in OPTIONS.items() if option.flag is not None}
    grammar = read_schema(options)
    return defaults.sampling(grammar=grammar, **{name: value for name, value in given.items() if value != ()})


def read_schema(options: GenerateOptions) -> Grammar | None:
    """InputError for a file that is no JSON object, or where a schema could not be kept to."""
    if options.json_schema is None:
        return None
    from qwen3vl_disagg.engine.grammars import has_grammars, no_grammars

    if not has_grammars():
        raise no_grammars("--json-schema")
    schema = _parse_json(_read(options.json_schema), str(options.json_schema))
    if not isinstance(schema, dict):
        raise InputError(f"{options.json_schema}: a JSON Schema must be an object")
    return Grammar.of_schema(schema, param="--json-schema")


class Printer:
    """Answers to stdout; what is thought, and all else, to stderr."""

    def __init__(self) -> None:
        self._is_thinking = False

    def text(self, _: int, piece: str) -> None:
        self._end_thinking()
        print(piece, end="", flush=True)

    def reasoning(self, _: int, piece: str) -> None:
        self._is_thinking = True
        print(piece, end="", flush=True, file=sys.stderr)

    def end(self, result: Any) -> None:
        """The end of an answer whose text was printed as it came."""
        self._end_thinking()
        if result.text or not result.tool_calls:
            print()
        for call in result.tool_calls or []:
            self.json(call.function)

    def json(self, value: object) -> None:
        """A line of JSON, in UTF-8 whatever the terminal has. It is out when this returns: nothing takes it back."""
        sys.stdout.flush()
        sys.stdout.buffer.write(json_line(value) + b"\n")
        sys.stdout.buffer.flush()

    def note(self, line: str) -> None:
        print(line, file=sys.stderr)

    def _end_thinking(self) -> None:
        if self._is_thinking:
            print(file=sys.stderr)
        self._is_thinking = False


# ---- what is asked ----


def conversations(options: GenerateOptions) -> Iterator[Any]:
    """What the options name, in OpenAI form; of --batch, a line's error may stand in its place.

    InputError for anything that can be seen to be wrong before the model is there.
    """
    given = [name for name in ("prompt", "messages", "batch") if getattr(options, name) is not None]
    if len(given) != 1:
        raise InputError(f"give exactly one of --prompt, --messages and --batch, got {given or 'none'}")
    if options.prompt is not None:
        for kind, files in (("image", options.image), ("video", options.video)):
            for file in files:
                _check_file(file, f"--{kind} {file[:100]}", kind)
        return iter([_conversation(list(options.image), list(options.video), options.prompt, options.system)])
    if options.image or options.video or options.system:
        raise InputError("--image, --video and --system go with --prompt only")
    if options.messages is not None:
        messages = _parse_json(_read(options.messages), str(options.messages))
        for url, kind, param in _media(messages):
            _check_file(url, url[:100], kind, param)
        return iter([messages])
    assert options.batch is not None
    if not options.batch.is_fifo() and not options.batch.is_char_device():
        # What can be read twice is looked through before the model is loaded.
        for entry in _entries(options.batch):
            if isinstance(entry, InputError):
                raise entry
    return _entries(options.batch)


def read_tools(options: GenerateOptions) -> list[Any]:
    """The functions of --tools. InputError naming the place of whatever is wrong."""
    if options.tools is None:
        return []
    from qwen3vl_disagg.processing import parse_tools

    return parse_tools(_parse_json(_read(options.tools), str(options.tools)))


def _entries(path: Path) -> Iterator[Any]:
    """Line by line: its conversation, or what is wrong with it. InputError if the file cannot be read."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > _MAX_LINE:
                    raise InputError(f"{where}: longer than {_MAX_LINE:,} bytes")
                line = line.removeprefix(_BOM) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    yield _entry(line, where, path.parent)
                except InputError as error:
                    yield error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _entry(line: bytes, where: str, folder: Path) -> Any:
    entry = _parse_json(line, where)
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must be an object")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        name = ENTRY_KEYS.get(key)
        if name is None:
            raise InputError(f"{where}: `{key[:64]}` is not known; there are {', '.join(ENTRY_KEYS)}")
        if value is None:  # tables write a column so that a row does not have
            continue
        if name in values:
            raise InputError(f"{where}: `{key}` is given twice, as `{name}` too")
        values[name] = value
    if "messages" in values:
        if len(values) > 1:
            raise InputError(f"{where}: `messages` goes with nothing else")
        return values["messages"]
    prompt, system = values.get("prompt"), values.get("system")
    if not isinstance(prompt, str):
        raise InputError(f"{where}: needs `messages`, or `prompt` with optional lists `images` and `videos`")
    if not isinstance(system, str | None):
        raise InputError(f"{where}: `system` must be a string")
    images, videos = (_files(values.get(name), f"{where}: `{name}`", folder) for name in ("images", "videos"))
    return _conversation(images, videos, prompt, system)


def _files(names: Any, where: str, folder: Path) -> list[str]:
    """Names relative to the batch file; URLs stay what they are."""
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} must be a file name, or a list of them")
    return [name if _URL.match(name) else str(folder / name) for name in names]


def _conversation(images: list[str], videos: list[str], prompt: str, system: str | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    parts += [{"type": "video_url", "video_url": {"url": video}} for video in videos]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
    return ([{"role": "system", "content": system}] if system is not None else []) + [turn]


def _media(messages: Any) -> Iterator[tuple[str, str, str]]:
    """(URL or path, `image` or `video`, where it stands) of what looks like a part with one."""
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else []):
            for kind in ("image", "video"):
                found = part.get(f"{kind}_url") if isinstance(part, dict) else None
                url = found.get("url") if isinstance(found, dict) else found
                if isinstance(url, str):
                    yield url, kind, f"messages[{i}].content[{j}]"


def _check_file(name: str, shown: str, kind: str, param: str | None = None) -> None:
    """InputError if it is a file that cannot be read, or lies elsewhere."""
    if _FETCHED.match(name):
        raise InputError(f"{shown}: nothing is fetched from elsewhere; give a file", param=param)
    if _URL.match(name):
        return
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # to open a pipe would take it from who reads it later
            with open(name, "rb"):
                pass
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise InputError(f"{shown}: {getattr(error, 'strerror', None) or error}", param=param) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return parse_json(data, is_strict=True)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from error


def bar(start: float, length: float, total: float, width: int) -> str:
    """A bar from `start` over `length` of `total`, in `width` columns, drawn to an eighth of a column."""
    if total <= 0:
        return " " * width
    first = min(width, int(start / total * width))
    eighths = min(round(length / total * width * 8), (width - first) * 8)
    drawn = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    if not drawn and length > 0:
        drawn = "▏"
    return (" " * first + drawn).ljust(width)[:width]


def waterfall(timings: RequestTimings, *, width: int = 40) -> str:
    """One request's stages for a terminal: lines `stage |bar| ms detail` of the stages one after another."""
    if timings.encode_ranks:
        images = f"{len(timings.items)} item(s) on encode rank {', '.join(map(str, timings.encode_ranks))}"
    else:
        images = ""
    stages = [
        ("queue", timings.queue, ""),
        ("preprocess", timings.preprocess, images),
        ("encode", timings.encode, f"{sum(item.rows for item in timings.items)} rows" if images else ""),
        ("transfer", timings.transfer, f"{timings.transfer_bytes / 1e3:,.1f} kB" if images else ""),
        ("prefill", timings.prefill, f"language rank {timings.language_rank}"),
        ("decode", timings.decode, ""),
    ]
    total = sum(ms for _, ms, _ in stages)
    lines, start = [], 0.0
    for name, ms, detail in stages:
        lines.append(f"{name:>10} |{bar(start, ms, total, width)}| {ms:9.1f} ms  {detail}".rstrip())
        start += ms
    return "\n".join(lines)
