"""Checkpoint folders <-> modules."""

from qwen3vl_disagg.checkpoint.fingerprint import decoder_digest, fingerprint, vision_digest
from qwen3vl_disagg.checkpoint.folder import Checkpoint, open_checkpoint, read_config
from qwen3vl_disagg.checkpoint.layouts import ExpertLayout
from qwen3vl_disagg.checkpoint.load import (
    check_weights,
    load_language_model,
    load_model,
    load_text_model,
    load_vision_model,
)
from qwen3vl_disagg.checkpoint.random import RANDOM_PRESETS, write_random_checkpoint
from qwen3vl_disagg.checkpoint.shards import Shards
from qwen3vl_disagg.checkpoint.write import config_to_dict, module_tensors, write_checkpoint

__all__ = [
    "RANDOM_PRESETS",
    "Checkpoint",
    "ExpertLayout",
    "Shards",
    "check_weights",
    "config_to_dict",
    "decoder_digest",
    "fingerprint",
    "load_language_model",
    "load_model",
    "load_text_model",
    "load_vision_model",
    "module_tensors",
    "open_checkpoint",
    "read_config",
    "vision_digest",
    "write_checkpoint",
    "write_random_checkpoint",
]
