"""From messages and media to token ids, grids, patches and positions."""

from qwen3vl_disagg.processing.answer_text import AnswerText, StopMatcher
from qwen3vl_disagg.processing.generation import GenerationDefaults
from qwen3vl_disagg.processing.images import ImageInfo, ImageProcessor, smart_resize
from qwen3vl_disagg.processing.positions import Grid, item_positions, mrope_positions
from qwen3vl_disagg.processing.processor import Processor, Prompt
from qwen3vl_disagg.processing.template import ChatTemplate
from qwen3vl_disagg.processing.tokenizer import TextStream, Tokenizer

__all__ = [
    "AnswerText",
    "ChatTemplate",
    "GenerationDefaults",
    "Grid",
    "ImageInfo",
    "ImageProcessor",
    "Processor",
    "Prompt",
    "StopMatcher",
    "TextStream",
    "Tokenizer",
    "item_positions",
    "mrope_positions",
    "smart_resize",
]
