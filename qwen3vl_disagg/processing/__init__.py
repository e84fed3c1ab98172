"""From messages and media to token ids, grids, patches and positions."""

from qwen3vl_disagg.processing.answer_parts import AnswerParts, AnswerReason, Parts, ToolCall
from qwen3vl_disagg.processing.clips import VideoProcessor
from qwen3vl_disagg.processing.generation import GenerationDefaults
from qwen3vl_disagg.processing.patches import ImageProcessor
from qwen3vl_disagg.processing.positions import Grid, item_positions, mrope_positions
from qwen3vl_disagg.processing.processor import Processor, Prompt
from qwen3vl_disagg.processing.template import ChatTemplate
from qwen3vl_disagg.processing.tokenizer import Tokenizer
from qwen3vl_disagg.processing.tools import parse_tools

__all__ = [
    "AnswerParts",
    "AnswerReason",
    "ChatTemplate",
    "GenerationDefaults",
    "Grid",
    "ImageProcessor",
    "Parts",
    "Processor",
    "Prompt",
    "Tokenizer",
    "ToolCall",
    "VideoProcessor",
    "item_positions",
    "mrope_positions",
    "parse_tools",
]
