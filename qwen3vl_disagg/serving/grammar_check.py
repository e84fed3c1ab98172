"""Whether ranks can work with a grammar: it is compiled as they do it, and its first tokens come."""

from __future__ import annotations

import numpy as np

from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.engine.llguidance_matcher import LlguidanceCompiler, LlguidanceMatcher
from qwen3vl_disagg.processing import Processor

_NUM_TOKENS = 4


class GrammarCheck:
    """Called with a grammar, and whether its answer begins within reasoning. InputError as a rank has it."""

    def __init__(self, processor: Processor) -> None:
        config = processor.config
        self._compiler = LlguidanceCompiler(
            processor.tokenizer,
            config.text.vocab_size,
            eos_ids=processor.generation.eos_token_ids,
            banned_ids=(config.image_token_id, config.video_token_id),
        )

    def __call__(self, grammar: Grammar, in_reasoning: bool) -> None:
        compiled = self._compiler.compile(grammar, in_reasoning=in_reasoning)
        matcher = LlguidanceMatcher(self._compiler, compiled, grammar, in_reasoning=in_reasoning)
        for _ in range(_NUM_TOKENS):
            mask = matcher.mask()
            may_come = np.flatnonzero(np.unpackbits(mask.bits & ~self._compiler.ends, bitorder="little"))
            if not len(may_come):
                return
            matcher.consume(int(may_come[0]))
