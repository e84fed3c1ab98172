"""The model as plain modules: no ranks, no processes, no global state."""

from qwen3vl_disagg.model.attention import ForwardBatch
from qwen3vl_disagg.model.config import ModelConfig, TextConfig, VisionConfig
from qwen3vl_disagg.model.decoder import Qwen3MoeForCausalLM, Qwen3MoeModel
from qwen3vl_disagg.model.deepstack import (
    Qwen3MoeForCausalLMWithDeepStack,
    Qwen3MoeLLMModel,
    Qwen3MoeModelWithDeepStack,
    separate_deepstack,
)
from qwen3vl_disagg.model.kernels import use_kernels
from qwen3vl_disagg.model.paged import PagedBatch
from qwen3vl_disagg.model.vl import Qwen3VLMoeForConditionalGeneration, splice_visual

__all__ = [
    "ForwardBatch",
    "ModelConfig",
    "PagedBatch",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeForCausalLMWithDeepStack",
    "Qwen3MoeLLMModel",
    "Qwen3MoeModel",
    "Qwen3MoeModelWithDeepStack",
    "Qwen3VLMoeForConditionalGeneration",
    "TextConfig",
    "VisionConfig",
    "separate_deepstack",
    "splice_visual",
    "use_kernels",
]
