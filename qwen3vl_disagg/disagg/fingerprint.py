"""What an encode rank and a language rank must agree on before a row travels."""

from __future__ import annotations

from collections.abc import Mapping

from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.disagg.layout import RowSizes
from qwen3vl_disagg.disagg.messages import PROTOCOL_VERSION
from qwen3vl_disagg.model import ModelConfig
from qwen3vl_disagg.processing import ImageProcessor

Fingerprint = dict[str, str]


def link_fingerprint(
    config: ModelConfig, *, itemsize: int, dtype: str, block_size: int, processor: ImageProcessor, weights: str
) -> Fingerprint:
    """Named fields, all text. `weights` is the digest of the vision weights in the checkpoint."""
    levels = config.num_deepstack_levels
    sizes = RowSizes.of(hidden_size=config.text.hidden_size, num_levels=levels, itemsize=itemsize)
    return {
        "protocol": str(PROTOCOL_VERSION),
        "hidden_size": str(config.text.hidden_size),
        "deepstack_levels": str(levels),
        "deepstack_indexes": str(list(config.vision.deepstack_visual_indexes)),
        "dtype": dtype,
        "block_size": str(block_size),
        **{f"row_bytes.{name}": str(getattr(sizes, name)) for name in sizes.__dataclass_fields__},
        "image_token_id": str(config.image_token_id),
        "video_token_id": str(config.video_token_id),
        "vision_start_token_id": str(config.vision_start_token_id),
        "vision_end_token_id": str(config.vision_end_token_id),
        "patch_size": str(config.vision.patch_size),
        "temporal_patch_size": str(config.vision.temporal_patch_size),
        "spatial_merge_size": str(config.vision.spatial_merge_size),
        **processor.settings(),
        "vision_weights": weights,
    }


def check_fingerprint(expected: Mapping[str, str], got: Mapping[str, str]) -> None:
    """HandshakeError naming the first field that differs and both values."""
    for field in sorted({*expected, *got}):
        if expected.get(field) != got.get(field):
            raise HandshakeError(field, expected.get(field, "absent"), got.get(field, "absent"))
