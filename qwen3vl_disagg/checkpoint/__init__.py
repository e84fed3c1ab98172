"""Checkpoint folders <-> modules."""

from qwen3vl_disagg.checkpoint.fingerprint import decoder_digest, fingerprint
from qwen3vl_disagg.checkpoint.folder import Checkpoint, open_checkpoint, read_config
from qwen3vl_disagg.checkpoint.layouts import ExpertLayout
from qwen3vl_disagg.checkpoint.load import (
    Shards,
    check_weights,
    load_as,
    load_language_model,
    load_model,
    load_vision_model,
)

__all__ = [
    "Checkpoint",
    "ExpertLayout",
    "Shards",
    "check_weights",
    "decoder_digest",
    "fingerprint",
    "load_as",
    "load_language_model",
    "load_model",
    "load_vision_model",
    "open_checkpoint",
    "read_config",
]
