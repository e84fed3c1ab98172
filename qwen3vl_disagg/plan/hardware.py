"""What a machine gives: the figures that turn bytes, operations and messages into seconds, each with its source.

Of a GPU only memory bandwidth and matmul rate of an H200 were measured by this project; overheads of a step are
assumptions, marked as such in `source`.

* H200: 4.3 TB/s (a copy) and 790 TFLOP/s dense bfloat16 measured by this project on one H200. 141 GB, 8 in a host,
  NVLink 900 GB/s both ways, 400 Gb/s adapters (one for each GPU is counted): MLCommons inference v4.1, system
  description H200-SXM-141GBx8_TRT.
* H100 (SXM): 80 GB, 3.35 TB/s, 1,979 TFLOP/s bfloat16 with sparsity, half of that dense, NVLink 900 GB/s; both GPUs
  67 TFLOP/s float32: NVIDIA's data sheets.
* NCCL: 6.6 us for a collective, 0.6 us for a hop over NVLink, 2.7 us over a network: the constants of NCCL's own cost
  model for rings and its protocol LL (`src/graph/tuning.cc`).
* 72 % of the memory's bandwidth in decode: gpt-fast's README, Llama-2-7B on an A100. Half of the FLOP/s: assumed.
* Rows from encode to language ranks at 2.8 GB/s: docs/benchmarks.md, link+handshake at 16 MB, on 2 CPU cores. Rows
  travel over Gloo on GPUs too.
* CPU: 29 GB/s read by one core and 37 by two, 187 GFLOP/s float32 and 918 GFLOP/s bfloat16 on two, measured by this
  project on an AMD EPYC with AVX-512 BF16; 0.6 of the bandwidth in decode and half of the FLOP/s: `mid` beside its
  ceilings, docs/benchmarks.md; 50 us of decoding for a visual token: the least of 7 runs on a JPEG of 1024 x 1024 on
  one of these cores; 0.6 ms for an exchange over Gloo, 0.2 ms for a hop, 1.3 GB/s: a fit (`bench.py splits`) to the
  small checkpoint served as 1+1, 1+2, 1+3, 2+4 and 2+6 on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch

from qwen3vl_disagg.core.devices import resolve_device
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.host import available_bytes
from qwen3vl_disagg.core.settings import EngineSettings
from qwen3vl_disagg.parallel.kv_room import KvRoom, planned_room
from qwen3vl_disagg.parallel.sizes import SizedModel

Cost = Literal[
    "byte",
    "flop",
    "tower",
    "tower_flop",
    "step",
    "layer",
    "request",
    "exchange",
    "hop",
    "host_hop",
    "wire_byte",
    "link",
    "link_byte",
    "preprocess_row",
    "item",
    "http",
]
COSTS: tuple[Cost, ...] = get_args(Cost)
"""What seconds are made of: so many of each, each at so many seconds."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Figures of one unit (a GPU or a core) unless said otherwise; bytes, FLOPs and seconds.

    The shares are the parts of bandwidth and FLOP/s that real steps reach.
    """

    name: str
    source: str
    """Where the figures come from, and which of them nobody has measured."""
    is_cuda: bool
    memory_bytes: float
    bytes_s: float
    """Memory bandwidth."""
    float32_flop_s: float
    bfloat16_flop_s: float
    """Dense."""
    num_units: int | None = None
    """Units that all ranks share; None: each rank has one of its own."""
    memory_lanes: float | None = None
    """What `num_units` read together, in units of what one reads alone; None: each has its own bandwidth."""
    units_per_host: int | None = None
    """None: all are on one host."""
    bytes_share: float = 1.0
    flop_share: float = 1.0
    tower_flop_share: float = 1.0
    step_s: float = 0.0
    """Of each step of a rank, whatever is in it."""
    layer_s: float = 0.0
    """Of each layer in it."""
    request_s: float = 0.0
    """Of each request in it: scheduling, sampling, sending the token."""
    exchange_s: float = 0.0
    """Of one collective between language ranks."""
    hop_s: float = 0.0
    """Of each further rank in it, on the same host; `host_hop_s`: on the next one."""
    host_hop_s: float = 0.0
    wire_bytes_s: float = math.inf
    """Of a rank in a collective."""
    host_wire_bytes_s: float = math.inf
    """Of a host's adapters together, between hosts."""
    link_s: float = 0.0
    """Of one image's way from encode to language rank; `link_bytes_s`: of its rows."""
    link_bytes_s: float = math.inf
    preprocess_row_s: float = 0.0
    """Decoding, resizing and cutting up, for each visual token."""
    tower_s: float = 0.0
    """Of each image in the vision tower, beside its operations."""
    item_s: float = 0.0
    """Of each image beside its stages; `http_s`: of each request."""
    http_s: float = 0.0
    reserved_bytes: float = 0.0
    """What a rank's process takes before any model."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and (math.isnan(value) or value < 0):
                raise InputError(f"{field.name} is {value}: must not be negative", param="hardware")
        for name in ("memory_bytes", "bytes_s", "float32_flop_s", "bfloat16_flop_s", "bytes_share", "flop_share"):
            if not getattr(self, name):
                raise InputError(f"{name} is 0", param="hardware")
        if 0 in (self.tower_flop_share, self.wire_bytes_s, self.host_wire_bytes_s, self.link_bytes_s):
            raise InputError("a rate is 0", param="hardware")
        if 0 in (self.num_units, self.units_per_host) or (self.memory_lanes or 1) < 1:
            raise InputError("num_units, units_per_host and memory_lanes must be at least 1", param="hardware")

    def flop_s(self, dtype: str) -> float:
        return self.float32_flop_s if dtype == "float32" else self.bfloat16_flop_s

    def costs(self, dtype: str, num_hosts: int = 1) -> dict[Cost, float]:
        """Seconds for one of each. Over several hosts a collective's bytes go no faster than a host's adapters."""
        wire = min(self.wire_bytes_s, self.host_wire_bytes_s) if num_hosts > 1 else self.wire_bytes_s
        rates: dict[Cost, float] = {
            "byte": self.bytes_s * self.bytes_share,
            "flop": self.flop_s(dtype) * self.flop_share,
            "tower_flop": self.flop_s(dtype) * self.tower_flop_share,
            "wire_byte": wire,
            "link_byte": self.link_bytes_s,
        }
        return {name: 1 / rates[name] if name in rates else getattr(self, f"{name}_s") for name in COSTS}

    def with_costs(self, costs: dict[Cost, float], dtype: str, **changes: object) -> Hardware:
        """The same machine with fitted costs; what is not among them stays. A cost of 0 is an infinite rate."""
        figures: dict[str, Any] = {"bytes_share": 1.0} if "byte" in costs else {}
        for name, seconds in costs.items():
            rate = 1 / seconds if seconds else math.inf
            match name:
                case "byte" | "wire_byte" | "link_byte":
                    figures[f"{name}s_s"] = rate
                case "flop" | "tower_flop":
                    figures[f"{name}_share"] = rate / self.flop_s(dtype)
                case _:
                    figures[f"{name}_s"] = seconds
        return replace(self, **figures | changes)


_GPU_ASSUMED = "nobody has measured overheads of steps, flop_share and collectives on GPUs"
_H200 = Hardware(
    name="h200",
    source=f"bandwidth and FLOP/s measured on one H200; sizes and links from descriptions; {_GPU_ASSUMED}",
    is_cuda=True,
    memory_bytes=141e9,
    bytes_s=4.3e12,
    float32_flop_s=67e12,
    bfloat16_flop_s=790e12,
    units_per_host=8,
    bytes_share=0.72,
    flop_share=0.5,
    tower_flop_share=0.5,
    step_s=1e-3,
    layer_s=2e-5,
    request_s=2e-5,
    exchange_s=6.6e-6,
    hop_s=0.6e-6,
    host_hop_s=2.7e-6,
    wire_bytes_s=450e9,
    host_wire_bytes_s=8 * 50e9,
    link_s=1e-3,
    link_bytes_s=2.8e9,
    preprocess_row_s=5e-5,
    item_s=2e-3,
    http_s=5e-3,
    reserved_bytes=2 * 2**30,
)
BUILT_IN: dict[str, Hardware] = {
    "h200": _H200,
    "h100": replace(
        _H200,
        name="h100",
        source=f"data sheet, none of it measured; {_GPU_ASSUMED}",
        memory_bytes=80e9,
        bytes_s=3.35e12,
        bfloat16_flop_s=1979e12 / 2,
    ),
    "cpu": Hardware(
        name="cpu",
        source="2 cores of an AMD EPYC with AVX-512 BF16, measured; overheads of steps are rounded, --fit finds yours",
        is_cuda=False,
        memory_bytes=12e9,
        bytes_s=29e9,
        float32_flop_s=187e9 / 2,
        bfloat16_flop_s=918e9 / 2,
        num_units=2,
        memory_lanes=37 / 29,
        bytes_share=0.6,
        flop_share=0.5,
        tower_flop_share=0.5,
        step_s=1e-3,
        layer_s=1e-4,
        request_s=2e-4,
        exchange_s=6e-4,
        hop_s=2e-4,
        wire_bytes_s=1.3e9,
        link_s=1e-3,
        link_bytes_s=2.8e9,
        preprocess_row_s=5e-5,
        item_s=2e-3,
        http_s=5e-3,
        reserved_bytes=2.7e8,
    ),
}


def load_hardware(name: str) -> Hardware:
    """A built-in machine, or a JSON file with the fields of `Hardware`. InputError naming what is wrong where."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not name.endswith(".json"):
        raise InputError(f"--hardware {name}: one of {', '.join(BUILT_IN)}, or a .json file", param="hardware")
    try:
        raw = msgspec.json.decode(Path(name).read_bytes())
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}", param="hardware") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not JSON: {error}", param="hardware") from error
    known = {field.name for field in fields(Hardware)}
    if isinstance(raw, dict) and (unknown := sorted(set(raw) - known)):
        raise InputError(
            f"{name}: no fields {', '.join(unknown)}; there are {', '.join(sorted(known))}", param="hardware"
        )
    try:
        return msgspec.convert(raw, Hardware)
    except (msgspec.ValidationError, InputError) as error:
        raise InputError(f"{name}: {error}", param="hardware") from error


@dataclass(frozen=True)
class Units:
    """How ranks share the units of a machine. `memory_lanes`: how many of them the memory can serve at full speed."""

    num_units: int
    num_ranks: int
    memory_lanes: float

    @classmethod
    def of(cls, hardware: Hardware, num_ranks: int) -> Units:
        num_units = hardware.num_units or num_ranks
        return cls(num_units, num_ranks, min(hardware.memory_lanes or num_units, num_units))

    @property
    def are_shared(self) -> bool:
        return self.num_ranks > self.num_units

    @property
    def each(self) -> int:
        """Units that a rank has for itself."""
        return max(1, self.num_units // self.num_ranks)

    def spread(self, work: Sequence[float]) -> float:
        """What the slowest has to do when each entry is one rank's part of something that all begin together: its own
        part, or an even share of everything where there are fewer units than ranks."""
        return max(max(work), sum(work) / self.num_units)

    def compute(self, work: Sequence[float]) -> float:
        """The same for work that a rank does on all the units it has for itself."""
        return self.spread(work) / self.each

    def read(self, work: Sequence[float]) -> float:
        """The same for bytes of memory."""
        return max(max(work) / min(self.each, self.memory_lanes), sum(work) / self.memory_lanes)


@dataclass(frozen=True)
class Memory:
    """Bytes before any weights: of each rank's card, else of the host that all of them share."""

    name: str
    is_cuda: bool
    has_cards: bool
    free: float
    total: float

    @classmethod
    def of(cls, hardware: Hardware, num_ranks: int) -> Memory:
        """All of a machine that nothing else uses."""
        has_cards = hardware.num_units is None
        total = hardware.memory_bytes * (hardware.num_units or 1)
        reserved = hardware.reserved_bytes * (1 if has_cards else num_ranks)
        name = f"{hardware.name}, {total / 1e9:g} GB for {'each rank' if has_cards else 'all ranks'}"
        return cls(name, hardware.is_cuda and has_cards, has_cards, total - reserved, total)

    @classmethod
    def here(cls, device: str, num_ranks: int) -> Memory:
        """What is free on this machine, for the device that an option names."""
        found = resolve_device(device, num_local_ranks=num_ranks)
        if found.type == "cuda":
            return cls("this machine's GPUs", True, True, *torch.cuda.mem_get_info(found))
        return cls("this machine", False, False, available_bytes(), 0.0)

    def room(
        self,
        rank: int,
        model: SizedModel,
        settings: EngineSettings,
        encode: range,
        language: range,
        image_rows: int = 0,
    ) -> KvRoom:
        """For keys and values of a language rank. Ranks without cards are all on one host."""
        return planned_room(
            model,
            settings,
            rank,
            free_bytes=self.free,
            total_bytes=self.total,
            encode=encode,
            language=language,
            beside=range(rank, rank + 1) if self.has_cards else range(max(encode.stop, language.stop)),
            image_rows=image_rows,
        )
