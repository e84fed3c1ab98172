"""Options of the commands. Nothing heavy is imported here: whoever asks for help does not wait for torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from tyro.conf import OmitArgPrefixes

from qwen3vl_disagg.core.logs import LogFormat
from qwen3vl_disagg.core.sampling_params import DEFAULTS, OPTIONS
from qwen3vl_disagg.core.settings import (
    BufferOptions,
    Canary,
    CheckpointOptions,
    Dispatch,
    EncodeOptions,
    EngineSettings,
    ExpertLayout,
    GapTarget,
    HttpOptions,
    ModelOptions,
    TlsOptions,
)

Options = TypeVar("Options")
Written = Literal["none", "fp8"]


def _with_sampling(cls: type[Options]) -> type[Options]:
    """A field for each sampling option that has a flag, ahead of the class's last one. None: the checkpoint's own."""
    fields = cls.__annotations__
    last = fields.popitem()
    for name, option in OPTIONS.items():
        kind, default = option.kind.flag_type, None if option.is_checkpoints else DEFAULTS[name]
        if option.flag is None:
            continue
        if get_origin(kind) is tuple:  # a flag for each
            metavar, default = {str: "TEXT", int: "INT"}[get_args(kind)[0]], ()
            arg = tyro.conf.arg(metavar=metavar, help=option.flag or None)
            fields[name] = Annotated[kind, tyro.conf.UseAppendAction, arg]
        else:
            fields[name] = Annotated[
                kind if default is not None else kind | None, tyro.conf.arg(help=option.flag or None)
            ]
        setattr(cls, name, default)
    fields.update([last])
    return cls


@dataclass(frozen=True, kw_only=True)
@_with_sampling
class GenerateOptions:
    """Answer one question, or a file of them, in one process.

    The user turn is the images in order, then the videos, then the prompt. Sampling values that are not given come
    from the checkpoint.
    """

    model: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    encode: OmitArgPrefixes[EncodeOptions] = field(default_factory=EncodeOptions)
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Image file; repeat for several."""
    video: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Video file; repeat for several. Needs the extra `video`."""
    prompt: str | None = None
    """The question."""
    messages: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """A conversation in OpenAI chat form, in place of --image, --video and --prompt."""
    batch: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """One JSON object a line (`messages`, or `prompt` with `images`, `videos` and `system`): one JSON result a line, as
    soon as it and those before it are done."""
    system: str | None = None
    """System turn before the question."""
    tools: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Functions that the model may call: a list in OpenAI form."""
    json_schema: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """What every answer must be: JSON by this schema. Needs the extra `serve`."""
    json: bool = False
    """Print one JSON object in place of text."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(EngineSettings):
    """Size a deployment: memory, times and limits of each encode : language split, with the formulas.

    docs/sizing.md says what is computed and what is left out.
    """

    model: Annotated[str | None, tyro.conf.arg(metavar="DIR_OR_HUB_ID")] = None
    """Checkpoint folder, or ORG/NAME[@REVISION] of the hub, of which only the settings are read. Without it, the small
    one inside the package."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """A published size in place of a checkpoint: 30b-a3b, 235b-a22b, 2b, 4b, 8b, 32b."""
    hardware: Annotated[str | None, tyro.conf.arg(metavar="NAME_OR_FILE.json")] = None
    """h200, h100, cpu, or a file with the fields of `Hardware`. Default: h200, with --fit the machine measured."""
    gpus: Annotated[int, tyro.conf.arg(aliases=["--ranks"])] = 8
    """Ranks, on a GPU each; on a CPU they share the cores."""
    replicas: int = 1
    """Independent systems that these are divided into, and the requests with them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: the checkpoint's own."""
    quantize: Literal["none", "int8"] = "none"
    """Weights of the decoder."""
    dispatch: Dispatch = "gather"
    """How tokens get to their experts: all to all ranks, or only where they have to."""
    images: int = 1
    """Images in a request."""
    image_size: Annotated[str, tyro.conf.arg(metavar="WxH")] = "1024x1024"
    """Pixels of an image, before the checkpoint's own resizing."""
    visual_tokens: int | None = None
    """Of an image, in place of its size."""
    text_tokens: int = 64
    """Of a prompt, beside the visual ones."""
    output_tokens: int = 256
    concurrency: int | None = None
    """Requests that run at once. Default: 32, unless --requests-s is given."""
    requests_s: float | None = None
    """Requests that arrive in a second, in place of --concurrency."""
    split: Annotated[str | None, tyro.conf.arg(metavar="E+L")] = None
    """Show this split, in place of the best one."""
    fit: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Measurements of `recipes/bench.py splits --out FILE.json`: take model and machine from them."""
    fit_on: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="E+L")] = ()
    """Fit on these splits of the file alone, and compare the others with what is predicted; repeat for several."""
    details: bool = False
    """Print every split, what memory is for, and the formulas with their values, in place of a short answer."""
    json: bool = False
    """Print one JSON object in place of text."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a checkpoint again: in another layout, another dtype, as float8 or from it, in files of another size."""

    model: Annotated[str | None, tyro.conf.arg(metavar="DIR_OR_HUB_ID")] = None
    """Checkpoint to read. Without it, the small one inside the package."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write: new, or empty."""
    layout: ExpertLayout = "hub"
    """How experts are stored and the config is spelled: as published, as transformers 5 does, or a tensor for each
    expert."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of what is not float8. `auto`: the checkpoint's own."""
    quantize: Written = "none"
    """`fp8`: the decoder's matrices as float8 in blocks of 128 x 128. `none` also makes plain weights of float8."""
    max_shard_bytes: int = 5_000_000_000
    """Most bytes of a file; a larger tensor gets a file of its own."""


@dataclass(frozen=True, kw_only=True)
class DryRunOptions:
    """How the model would be spread over ranks."""

    dry_run: bool = False
    """Print what each rank would hold, and leave: nothing is loaded, and torchrun is not needed."""
    world: Annotated[int | None, tyro.conf.arg(metavar="W")] = None
    """Number of ranks, where torchrun does not say it. Default: 2, with --dry-run 8."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """With --dry-run: a published size in place of a checkpoint."""
    hardware: Annotated[str | None, tyro.conf.arg(metavar="NAME_OR_FILE.json")] = None
    """With --dry-run: whose memory keys and values are fitted into, as of `plan`: h200, h100, cpu or a file. Default:
    this machine's."""
    json: bool = False
    """With --dry-run: one JSON object."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a checkpoint over HTTP."""

    model: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    buffers: OmitArgPrefixes[BufferOptions] = field(default_factory=BufferOptions)
    encode: OmitArgPrefixes[EncodeOptions] = field(default_factory=EncodeOptions)
    http: OmitArgPrefixes[HttpOptions] = field(default_factory=HttpOptions)
    dry: OmitArgPrefixes[DryRunOptions] = field(default_factory=DryRunOptions)
    encode_ranks: int | None = None
    """Ranks 0 .. E-1 encode, the others generate. Default: a quarter, at least one."""
    overlap: Literal["on", "off"] = "on"
    """Prefill what is there while later images of the same request are still encoded or sent."""
    prefix_cache: Literal["on", "off"] = "on"
    """Keep what full pages hold, for prompts that begin the same way."""
    chunk_tokens: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Tokens of prompts in a step while other requests are being answered: fewer disturb those less, and take longer
    themselves. Default: as --gap-target-ms has it."""
    gap_target_ms: Annotated[GapTarget, tyro.conf.arg(metavar="auto|MS")] = "auto"
    """What the time between two tokens of a request should be while others' prompts are prefilled; how many tokens of
    these go between follows from what steps take. `auto`: three times that of a step, at least 100 on CPU and 50 on a
    GPU."""
    spans: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write what each rank does when as JSON lines into this folder."""
    log_format: LogFormat = "text"
    """`json`: an object a line, in place of text."""
    gpus: Annotated[str | None, tyro.conf.arg(metavar="LIST")] = None
    """Which GPUs this host's ranks take, one each, in their order: `2,3`. Default: from the first on."""
    canary: Canary = "auto"
    """Before a rank serves, compare what it computes with what the checkpoint's files give, and refuse it if that
    differs. `auto`: of a decoder of more than 512 MiB the first layers; `full`: all of it; `off`: nothing."""
    debug: bool = False
    """Open GET /debug/processes."""
    hub: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """An address of node 0, where ranks of other nodes, and encode ranks that join, meet the job. Needs a token.
    Default: loopback, and any port."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """What ranks show to be let in. Other users of this host can see it in the command line: the environment variable
    Q3VL_TOKEN does the same. Default without --hub: random."""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST")] = None
    """This node's own address, on which its ranks listen for one another. Default: the one that faces the hub."""
    tls: OmitArgPrefixes[TlsOptions] = field(default_factory=TlsOptions)


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """Join a running server with encode ranks."""

    checkpoint: OmitArgPrefixes[CheckpointOptions] = field(default_factory=CheckpointOptions)
    encode: OmitArgPrefixes[EncodeOptions] = field(default_factory=EncodeOptions)
    join: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")]
    """The server's hub, as it says in its line `hub: ..`."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """The server's token. Other users of this host can see it in the command line: the environment variable Q3VL_TOKEN
    does the same."""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST")] = None
    """This host's own address, over which rows leave. Default: the one that faces the hub."""
    tls: OmitArgPrefixes[TlsOptions] = field(default_factory=TlsOptions)
    block_size: int = BufferOptions.block_size
    """Rows per block, as the server has it."""
    gpus: Annotated[str | None, tyro.conf.arg(metavar="LIST")] = None
    """Which GPUs the ranks take, one each, in their order: `2,3`. Default: from the first on, which on the server's own
    host its ranks have."""
    canary: Canary = "auto"
    """Before the rank joins, compare the rows that it makes of a picture with what the checkpoint's files give; if they
    differ, it does not. `full` is `auto`; `off`: do not."""
    log_format: LogFormat = "text"
    """`json`: an object a line, in place of text."""


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Write what the ranks of a running server did lately, for Perfetto or chrome://tracing."""

    url: str = "http://127.0.0.1:8000"
    """Of the server."""
    seconds: float = 30.0
    """How far back, up to 600; ranks keep their last spans only."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")] = Path("trace.json")
    overwrite: bool = False
    """Replace the file, if it is there."""
    api_key: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """One of the server's. Other users of this host can see it in the command line: the environment variable
    Q3VL_API_KEY does the same."""


OPTIONS_OF: dict[str, Callable[..., Any]] = {
    "generate": GenerateOptions,
    "serve": ServeOptions,
    "plan": PlanOptions,
    "convert": ConvertOptions,
    "trace": TraceOptions,
}
"""Command -> what makes its options."""
