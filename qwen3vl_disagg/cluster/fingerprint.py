"""What an encode rank and a language rank must agree on before a row travels."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import PROTOCOL_VERSION

Fingerprint = dict[str, str]


def link_fingerprint(
    config: ModelConfig,
    checkpoint: Mapping[str, str],
    *,
    dtype: torch.dtype,
    block_size: int,
    processor: ImageProcessor,
) -> Fingerprint:
    """The checkpoint's fingerprint (`checkpoint.fingerprint`) and how this job uses it; named fields, all text."""
    levels = config.num_deepstack_levels
    sizes = RowSizes.of(hidden_size=config.text.hidden_size, num_levels=levels, itemsize=dtype.itemsize)
    return {
        **checkpoint,
        **processor.settings(),
        "protocol": str(PROTOCOL_VERSION),
        "deepstack_levels": str(levels),
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": str(block_size),
        **{f"row_bytes.{name}": str(getattr(sizes, name)) for name in sizes.__dataclass_fields__},
    }


def check_fingerprint(expected: Mapping[str, str], got: Mapping[str, str]) -> None:
    """HandshakeError naming the first field that differs and both values."""
    for field in sorted({*expected, *got}):
        if expected.get(field) != got.get(field):
            raise HandshakeError(field, expected.get(field, "absent"), got.get(field, "absent"))
