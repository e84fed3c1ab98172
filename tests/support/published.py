"""Checkpoints in the form of the published ones, with random weights: the settings as the hub has them, the published
vocabulary and special ids, shards with an index. Only what a test names is reduced.

The settings are written down here apart from the package's own presets. Their sources are third parties' copies.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3vl_disagg.core.devices import DTYPES
from qwen3vl_disagg.model import ModelConfig, Qwen3VLMoeForConditionalGeneration
from tools.checkpoints import module_tensors, write_checkpoint
from tools.training.make_tokenizer import build_syllable_tokenizer, write_template

NAMES = {
    "2b": "Qwen/Qwen3-VL-2B",
    "4b": "Qwen/Qwen3-VL-4B",
    "8b": "Qwen/Qwen3-VL-8B",
    "32b": "Qwen/Qwen3-VL-32B",
    "30b-a3b": "Qwen/Qwen3-VL-30B-A3B",
    "235b-a22b": "Qwen/Qwen3-VL-235B-A22B",
}
REPOSITORIES = [
    f"{name}-{kind}{form}" for name in NAMES.values() for kind in ("Instruct", "Thinking") for form in ("", "-FP8")
]

_COLUMNS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_TEXT = {
    "2b": (2048, 28, 16, 8, 6144),
    "4b": (2560, 36, 32, 8, 9728),
    "8b": (4096, 36, 32, 8, 12288),
    "32b": (5120, 64, 64, 8, 25600),
    "30b-a3b": (2048, 48, 32, 4, 6144),
    "235b-a22b": (4096, 94, 64, 4, 12288),
}
_EXPERT_WIDTH = {"30b-a3b": 768, "235b-a22b": 1536}
_TIED = ("2b", "4b")
FIRST_ADDED = 151643
ADDED = {
    # 151643 on. True: special, so that it is skipped in the answer's text.
    **dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"), True),
    **dict.fromkeys(("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"), True),
    **dict.fromkeys(("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"), True),
    **dict.fromkeys(("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), False),
    **dict.fromkeys(("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"), False),
    **dict.fromkeys(("<think>", "</think>"), False),
}
NUM_TOKENS, NUM_ROWS = 151669, 151936


def settings(size: str) -> dict[str, Any]:
    """The parsed config.json of a size, as the hub spells it."""
    is_moe, is_small, is_tied = size in _EXPERT_WIDTH, size in ("2b", "4b"), size in _TIED
    family = "qwen3_vl_moe" if is_moe else "qwen3_vl"
    text: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 262144,
        "model_type": f"{family}_text",
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": NUM_ROWS,
        **dict(zip(_COLUMNS, _TEXT[size], strict=True)),
    }
    if is_moe:
        text |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": _EXPERT_WIDTH[size]}
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    if is_tied:
        text["tie_word_embeddings"] = True
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration" if is_moe else "Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": family,
        "text_config": text,
        "tie_word_embeddings": is_tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17] if is_small else [8, 16, 24],
            "depth": 24 if is_small else 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024 if is_small else 1152,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4096 if is_small else 4304,
            "model_type": family,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


def write_published(
    folder: Path, raw: Mapping[str, Any], *, thinking: bool = False, num_shards: int = 3, std: float = 0.02
) -> ModelConfig:
    """Write a whole checkpoint for a config.json, in bfloat16. Returns the config as the package reads it."""
    config = ModelConfig.from_dict(raw)
    write_checkpoint(folder, config, RandomWeights(config, std), num_shards=num_shards)
    write_tokenizer(folder, thinking=thinking)
    sampling = {"top_p": 0.95, "temperature": 1.0} if thinking else {"top_p": 0.8, "temperature": 0.7}
    processor = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    files = {
        "config.json": raw,
        "generation_config.json": {
            "bos_token_id": 151643,
            "pad_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "top_k": 20,
            "repetition_penalty": 1.0,
            "transformers_version": "4.56.0",
            **sampling,
        },
        "preprocessor_config.json": {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **processor,
        },
        "video_preprocessor_config.json": {
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            "video_processor_type": "Qwen3VLVideoProcessor",
            **processor,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return config


def write_tokenizer(folder: Path, *, thinking: bool = False) -> None:
    """151,643 tokens of made-up words, then the published added ones; the template in chat_template.json."""
    build_syllable_tokenizer(FIRST_ADDED, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    plain = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] = [
        {**plain, "id": FIRST_ADDED + i, "content": token, "special": is_special}
        for i, (token, is_special) in enumerate(ADDED.items())
    ]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
    write_template(folder, thinking=thinking)
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()


class RandomWeights(Mapping[str, Tensor]):
    """Normal weights under their published names, each made when it is looked up: all at once might not fit."""

    def __init__(self, config: ModelConfig, std: float) -> None:
        with torch.device("meta"):
            self._shapes = module_tensors(Qwen3VLMoeForConditionalGeneration(config))
        self._dtype, self._std = DTYPES[config.dtype], std

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name].shape
        generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        return torch.empty(shape, dtype=self._dtype).normal_(mean, self._std, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def shallow(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same with fewer decoder layers, and no more DeepStack levels than these: the last ones go."""
    less = copy.deepcopy(dict(raw))
    less["text_config"]["num_hidden_layers"] = layers
    less["vision_config"]["deepstack_visual_indexes"] = raw["vision_config"]["deepstack_visual_indexes"][:layers]
    return less


def narrow(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same with three narrow decoder layers and a small tower; head size, position table and ids stay."""
    less = shallow(raw, 3)
    is_moe = "num_experts" in less["text_config"]
    less["text_config"] |= {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    less["text_config"] |= {"intermediate_size": 48}
    if is_moe:
        less["text_config"] |= {"num_experts": 12, "moe_intermediate_size": 24}
    tower = {"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 32}
    less["vision_config"] |= {**tower, "deepstack_visual_indexes": [0, 1, 2]}
    return less
