"""The header of a safetensors file, checked against the file's size before anything maps it.

A file is 8 bytes (little-endian header length), the header (JSON: name -> dtype, shape, byte range), then the data
without a gap. A truncated file that is mapped anyway reads as zeros or kills the process, so sizes are settled here.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from qwen3vl_disagg.core.json_text import parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8
MAX_COUNT = 2**63

DTYPE_BYTES = {
    name: bits // 8
    for bits, names in {
        64: ("F64", "I64", "U64"),
        32: ("F32", "I32", "U32"),
        16: ("F16", "BF16", "I16", "U16"),
        8: ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
    }.items()
    for name in names
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `start` and `stop` are byte offsets in `file`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def rows_bytes(self, rows: range) -> int:
        """Bytes of some rows of dim 0."""
        return self.num_bytes // self.shape[0] * len(rows)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path, label: str) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of one file, and what is wrong with it; `label` names the file in both."""
    size = path.stat().st_size
    if size < 8:
        return {}, [f"{label}: {size} bytes, too short for a safetensors file"]
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER_BYTES, size - 8):
            limit = min(MAX_HEADER_BYTES, size - 8)
            return {}, [f"{label}: header length {length} is more than {limit} (file of {size} bytes)"]
        raw = file.read(length)
    try:
        header = parse_json(raw)
    except ValueError as error:
        return {}, [f"{label}: header is not JSON: {error}"]
    if not isinstance(header, dict):
        return {}, [f"{label}: header is not a JSON object"]
    header.pop("__metadata__", None)
    tensors, problems = {}, []
    for name, entry in header.items():
        info = _tensor_info(label, entry, data_start=8 + length)
        if isinstance(info, str):
            problems.append(f"{label}: {name}: {info}")
        else:
            tensors[name] = info
    if not problems:
        problems = _check_offsets(label, tensors, data_start=8 + length, size=size)
    return tensors, problems


def _tensor_info(label: str, entry: object, *, data_start: int) -> TensorInfo | str:
    """One header entry, or what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "entry lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"unknown dtype {repr(dtype)[:80]}"
    if not _are_counts(shape):
        return f"shape {repr(shape)[:80]} is not a list of non-negative integers, at most {MAX_DIMS}"
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {repr(offsets)[:80]} are not two rising integers"
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        return f"{dtype} {shape} needs {expected} bytes, data_offsets {offsets} hold {offsets[1] - offsets[0]}"
    return TensorInfo(label, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMS
        and all(type(v) is int and 0 <= v < MAX_COUNT for v in values)
    )


def _check_offsets(label: str, tensors: dict[str, TensorInfo], *, data_start: int, size: int) -> list[str]:
    """The byte ranges must follow one another from the header to the end of the file."""
    problems, end = [], data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            problems.append(f"{label}: {name}: data begins at byte {info.start}, expected {end} ({what})")
        end = max(end, info.stop)
    if size < end:
        problems.append(f"{label}: truncated: the header promises {end} bytes, the file has {size}")
    elif size > end:
        problems.append(f"{label}: {size - end} bytes after the last tensor ({size} bytes, expected {end})")
    return problems
