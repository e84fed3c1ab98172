"""Options shared by the commands. Nothing heavy is imported here: whoever asks for help does not wait for torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import InputError

Quantize = Literal["none", "int8", "float8"]
ImageResize = Literal["torch", "pillow"]
Task = Literal["generate", "embed", "rerank"]
TaskChoice = Literal["auto", "generate", "embed", "rerank"]
ExpertLayout = Literal["hub", "v5", "per_expert"]
Dispatch = Literal["gather", "all_to_all"]
Canary = Literal["auto", "full", "off"]
MAX_REQUEST_TIMEOUT_S = 86_400
MAX_NAME_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What to run and on what: both roles."""

    model: Annotated[str | None, tyro.conf.arg(metavar="DIR_OR_HUB_ID")] = None
    """Checkpoint folder, or ORG/NAME[@REVISION] of the Hugging Face hub. Without it, the small checkpoint inside the
    package."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: the checkpoint's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if there are at least as many GPUs as local ranks, else CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`auto`: on for CUDA, off on CPU."""
    image_resize: ImageResize = "torch"
    """How images and clips are resized. `torch`: as the reference does with torchvision; `pillow`: as without."""


def default_page_size(*, is_cuda: bool) -> int:
    """A GPU reads keys and values in tiles, and a page is as wide as one at most."""
    return 64 if is_cuda else 16


# name -> (least, most)
_ENGINE_BOUNDS = {"max_running": (1, 4096), "max_prefill_tokens": (1, 2**20), "page_size": (1, 4096)}
_MAX_GIB = 2**20


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Sizes of the engine on each language rank."""

    kv_cache_gib: Annotated[Literal["auto"] | float, tyro.conf.arg(metavar="auto|GIB")] = "auto"
    """Memory for keys and values of each language rank. `auto`: from what is free once the weights are loaded; of a CPU
    half of it, which the language ranks of a host share, of a GPU nine tenths."""
    max_running: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    """Requests that each language rank works on at once; more wait."""
    max_prefill_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 4096
    """Tokens of prompts in a step while no other request is being answered."""
    page_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Tokens in a page of keys and values. Default: 16 on a CPU, 64 on a GPU."""

    def tokens_in_page(self, *, is_cuda: bool) -> int:
        return self.page_size or default_page_size(is_cuda=is_cuda)

    def check(self) -> None:
        """InputError for a value that cannot be."""
        gib = self.kv_cache_gib
        if gib != "auto" and (isinstance(gib, (str, bool)) or not 0 < gib <= _MAX_GIB):
            bounds = f"auto, or more than 0 and at most {_MAX_GIB}"
            raise InputError(f"--kv-cache-gib {gib}: must be {bounds}", param="kv-cache-gib")
        for name, (least, most) in _ENGINE_BOUNDS.items():
            value, option = getattr(self, name), name.replace("_", "-")
            if value is None and name == "page_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise InputError(f"--{option} {value}: must be a whole number from {least} to {most}", param=option)


DEFAULT_ENGINE = EngineSettings()


GapTarget = Literal["auto"] | float
"""Milliseconds."""
MAX_GAP_MS = 60_000


def default_chunk_tokens(*, is_cuda: bool) -> int:
    """Tokens of prompts in a step while others are being answered, before any was measured: on a CPU as few as its
    kernels still work well with; a GPU wants more at once."""
    return 512 if is_cuda else 128


def default_gap_ms(*, is_cuda: bool) -> float:
    """Between two tokens while prompts are prefilled: ten tokens a second are faster than people read."""
    return 50.0 if is_cuda else 100.0


@dataclass(frozen=True, kw_only=True)
class ModelOptions(EngineSettings, CheckpointOptions):
    """What to run and on what, with a decoder."""

    quantize: Quantize = "none"
    """Weights of the decoder; `int8` and `float8` need the extra `quantize`."""
    video_outer_wrapper: bool = False
    """Keep the pair of start and end around a clip besides those of its frames, as transformers 5 does."""
    task: TaskChoice = "auto"
    """What the checkpoint is for: to answer, to give vectors, or to score documents. `auto`: as its `modules.json` or
    its name (Qwen3-VL-Embedding, Qwen3-VL-Reranker) says."""


@dataclass(frozen=True, kw_only=True)
class BufferOptions:
    """Room for visual rows on a language rank. One block is enough for any item: what does not fit is resumed."""

    block_size: int = 128
    """Rows per block."""
    blocks: int = 128
    """Blocks of embedding rows."""
    deepstack_rows: int | None = None
    """Rows of the DeepStack pool. Default: as many as there are embedding rows."""


MAX_SLOWDOWN = 100


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How an encode rank uses its memory and its vision tower."""

    embedding_cache_mib: int = 256
    """Memory for the rows of images that were encoded before; 0 keeps none."""
    vision_batch_tokens: int = 1024
    """Images go through the vision tower together up to this many visual tokens' worth of work; 0: one by one."""
    tower_slowdown: float = 1.5
    """Where the tower and the decoder have one GPU: a decode step beside the tower takes at most about so many times as
    long as alone."""

    @property
    def cache_bytes(self) -> int:
        return self.embedding_cache_mib << 20

    def check(self) -> None:
        """InputError for a number that is out of range."""
        if not 1 < self.tower_slowdown <= MAX_SLOWDOWN:
            bounds = f"more than 1 and at most {MAX_SLOWDOWN}"
            raise InputError(f"--tower-slowdown {self.tower_slowdown:g}: must be {bounds}", param="tower-slowdown")
        for name in ("embedding_cache_mib", "vision_batch_tokens"):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(self, name)}: must not be negative", param=option)


@dataclass(frozen=True, kw_only=True)
class TlsOptions:
    """Whom ranks take for ranks, beside the token: all three files or none. They may be replaced while a job runs."""

    tls_cert: Annotated[Path | None, tyro.conf.arg(metavar="FILE.pem")] = None
    """Encrypt the control connections between ranks (not the rows of images, nor what travels between experts): this
    host's certificate."""
    tls_key: Annotated[Path | None, tyro.conf.arg(metavar="FILE.pem")] = None
    """The certificate's key, without a password."""
    tls_ca: Annotated[Path | None, tyro.conf.arg(metavar="FILE.pem")] = None
    """Who has signed the certificates of all hosts. It should sign nothing else: names in certificates are not
    compared."""


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Whom the HTTP server serves, and for how long."""

    host: str = "127.0.0.1"
    """Address of the HTTP server."""
    port: int = 8000
    allow_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """A name by which clients address the server, as their Host header has it; may be repeated; `*`: any. Without it:
    localhost and loopback addresses; where --host is not one of these, any IP address and this machine's names."""
    allow_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="ORIGIN")] = ()
    """An origin (https://app.example) whose pages in browsers may use the server; may be repeated; `*`: any page."""
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY")] = field(
        default=(), repr=False
    )
    """A key that clients must show; may be repeated. Other users of this host can see it in the command line: a file or
    the environment variable Q3VL_API_KEY (several with blanks between them) do the same. Without any the server is
    open."""
    api_key_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file with keys, one a line."""
    allow_media_domain: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="HOST")] = ()
    """A host from which images and clips may be fetched by URL; may be repeated; `*.example.org`: all below it; `*`:
    all. Ports 80 and 443, or the one that is named (`example.org:8443`). Its addresses must be public ones. Without it
    URLs are refused."""
    allow_media_path: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")] = ()
    """A folder whose files clients may name as `file:///..` URLs; may be repeated."""
    served_model_name: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """What requests may call the model; may be repeated, and answers have the first one. Default: the folder's name."""
    max_model_len: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Tokens of a prompt and its answer together, at most. Default: the checkpoint's context."""
    max_waiting: Annotated[int, tyro.conf.arg(metavar="N")] = 1024
    """Requests that may wait for their first token; more are refused with 429."""
    request_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 600.0
    """How long a request may take if it does not say so itself (X-Request-Timeout-Ms)."""
    first_token_target_ms: Annotated[Literal["off"] | float, tyro.conf.arg(metavar="off|MS")] = 1000.0
    """When a request should have its first token, beside what its own work takes, if it does not say so itself
    (X-First-Token-Target-Ms): what is due first is served first, so short texts pass requests with many images, which
    become urgent as they wait. `off`: first come, first served, whatever requests say."""
    max_answer_tokens: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How long an answer may be whose request does not say so itself (max_tokens). Default: what is left of the
    context, and of the room for keys and values."""
    hide_cache_hits: Literal["on", "off"] = "off"
    """Tell clients nothing of what was there already. What is cached is shared by all clients whose requests have the
    same `cache_salt`, or none: a hit says that somebody sent the same image or prompt before."""

    @property
    def first_token_target_s(self) -> float:
        target = self.first_token_target_ms
        return FIRST_COME if isinstance(target, str) else target / 1e3

    def check(self) -> None:
        """InputError for a number that is out of range."""
        if self.max_waiting < 1:
            raise InputError(f"--max-waiting {self.max_waiting}: must be at least 1", param="max-waiting")
        for option, value in (("max-answer-tokens", self.max_answer_tokens), ("max-model-len", self.max_model_len)):
            if value is not None and value < 1:
                raise InputError(f"--{option} {value}: must be at least 1", param=option)
        for name in self.served_model_name:
            if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_CHARS:
                problem = f"must be 1 to {MAX_NAME_CHARS} characters that can be seen"
                raise InputError(f"--served-model-name {name!r}: {problem}", param="served-model-name")
        target = self.first_token_target_ms
        if target != "off" and (isinstance(target, str) or not 0 < target <= MAX_REQUEST_TIMEOUT_S * 1000):
            limit = f"off, or more than 0 and at most {MAX_REQUEST_TIMEOUT_S * 1000}"
            raise InputError(f"--first-token-target-ms {target}: must be {limit}", param="first-token-target-ms")
        if not 0 < self.request_timeout <= MAX_REQUEST_TIMEOUT_S:
            limit = f"more than 0 and at most {MAX_REQUEST_TIMEOUT_S}"
            raise InputError(f"--request-timeout {self.request_timeout:g}: must be {limit}", param="request-timeout")


def check_supported(options: ModelOptions) -> None:
    """InputError for a value that is none of an option's, which only the command line looks at, or is not installed."""
    check_quantize(options.quantize)
    options.check()
    if options.task not in get_args(TaskChoice):
        raise InputError(f"--task {options.task}: must be one of {', '.join(get_args(TaskChoice))}", param="task")
    if options.image_resize not in get_args(ImageResize):
        names = ", ".join(get_args(ImageResize))
        raise InputError(f"--image-resize {options.image_resize}: must be one of {names}", param="image_resize")


def check_quantize(kind: str) -> None:
    """InputError for a kind that is not known, and where torchao is not installed."""
    if kind not in get_args(Quantize):
        raise InputError(f"--quantize {kind}: must be one of {', '.join(get_args(Quantize))}", param="quantize")
    if kind != "none" and importlib.util.find_spec("torchao") is None:
        raise InputError(f"--quantize {kind} needs torchao: pip install 'qwen3vl-disagg[quantize]'", param="quantize")
