"""Grammars by llguidance. No other file knows the library.

Its own limits bound what a grammar may take to compile and for each token: an item of its parser, or a unit of a
lexer's fuel, takes less than a tenth of a microsecond. What compiling may take in seconds is bounded by who lets
strangers' grammars in (`serving/prepare_child.py`).
"""

from __future__ import annotations

import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark
from msgspec import structs

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.engine.masks import Mask
from qwen3vl_disagg.processing.answer_grammar import MAX_CHOICES, answer_grammar, begins_in_reasoning
from qwen3vl_disagg.processing.tokenizer import Tokenizer

MAX_KEPT = 8
"""Compiled grammars that are kept for requests to come, with what their lexers have learned."""
_MAX_SHOWN = 200


def _limits() -> LLParserLimits:
    return LLParserLimits(
        max_items_in_row=MAX_CHOICES + 400,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=30_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class _Vocabulary:
    """A tokenizer as `TokenizerWrapper` wants it. What tokenizer.json does not call special is text: `<tool_call>`."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_ids[0]
        self.tokens = [tokenizer.token_bytes(i) for i in range(max(tokenizer.vocab_size, max(eos_ids) + 1))]
        self.special_token_ids = sorted({*tokenizer.special_ids.values(), *eos_ids})
        self._of_byte = {data[0]: i for i, data in reversed([*enumerate(self.tokens)]) if len(data) == 1}

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are the text's: not composed, as a text of a prompt is."""
        if unicodedata.is_normalized("NFC", text):
            return self._tokenizer.encode(text)
        return [self._of_byte[byte] for byte in text.encode()]


class LlguidanceCompiler:
    """A vocabulary in the library's form, which takes a second for 150,000 tokens, and grammars compiled for it.

    `vocab_size`: of the logits. `banned_ids`: what no grammar lets come.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, *, eos_ids: frozenset[int], banned_ids: Sequence[int] = ()
    ) -> None:
        ends = sorted(eos_ids)
        self._tokenizer = tokenizer
        self._library = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, ends)), eos_token=ends)
        self.num_bytes = (self._library.vocab_size + 31) // 32 * 4
        """Of a mask, as the library writes it."""
        places = np.zeros((2, max(8 * self.num_bytes, vocab_size + 7 & -8)), np.uint8)
        places[0, list(banned_ids)] = 1
        places[1, ends] = 1
        self.banned, self.ends = np.packbits(places, axis=1, bitorder="little")
        self._kept: OrderedDict[tuple[Grammar, bool], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, grammar: Grammar, prompt_ids: Sequence[int]) -> LlguidanceMatcher:
        key = structs.replace(grammar, param=""), begins_in_reasoning(grammar, self._tokenizer, prompt_ids)
        with self._lock:
            kept = self._kept.get(key)
        if kept is None:
            kept = self.compile(grammar, in_reasoning=key[1])
            with self._lock:
                self._kept[key] = kept
                if len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return LlguidanceMatcher(self, kept.deep_copy(), grammar, in_reasoning=key[1])

    def compile(self, grammar: Grammar, *, in_reasoning: bool) -> LLMatcher:
        """InputError for a grammar that is wrong, too large, or that nothing fits."""
        text = answer_grammar(grammar, in_reasoning=in_reasoning, to_lark=_to_lark)
        matcher = LLMatcher(self._library, text, log_level=0, limits=_limits())
        if matcher.is_error():
            raise InputError(f"the grammar cannot be used: {_shown(matcher.get_error())}", param=grammar.param)
        return matcher

    def forget(self, grammar: Grammar, *, in_reasoning: bool) -> None:
        """What its lexer has learned has become too much."""
        with self._lock:
            self._kept.pop((structs.replace(grammar, param=""), in_reasoning), None)


class LlguidanceMatcher:
    def __init__(
        self, compiler: LlguidanceCompiler, matcher: LLMatcher, grammar: Grammar, *, in_reasoning: bool
    ) -> None:
        self._compiler, self._matcher = compiler, matcher
        self._grammar, self._in_reasoning = grammar, in_reasoning
        self._consumed: list[int] = []
        self._is_shared = True

    def consume(self, token_id: int) -> None:
        self._consumed.append(token_id)
        self._matcher.consume_token(token_id)  # what is wrong with it shows in the next mask

    def mask(self) -> Mask:
        bits = self._fill()
        if self._matcher.is_error() and self._is_shared:
            # Its limits count what all requests with this grammar have made of it; alone it may do.
            self._is_shared = False
            self._compiler.forget(self._grammar, in_reasoning=self._in_reasoning)
            self._matcher = self._compiler.compile(self._grammar, in_reasoning=self._in_reasoning)
            self._matcher.consume_tokens(self._consumed)
            bits = self._fill()
        if self._matcher.is_error():
            raise InputError(
                "the grammar takes more work for a token than this server does",
                param=self._grammar.param,
                code="grammar_too_complex",
            )
        bits &= ~self._compiler.banned
        if not bits.any():
            raise InputError("the grammar lets no token come", param=self._grammar.param, code="grammar_stuck")
        return Mask(bits)

    def copy(self) -> LlguidanceMatcher:
        matcher = self._matcher.deep_copy()
        made = LlguidanceMatcher(self._compiler, matcher, self._grammar, in_reasoning=self._in_reasoning)
        made._consumed += self._consumed
        self._is_shared = True  # with the copy
        return made

    def _fill(self) -> np.ndarray:
        bits = np.zeros_like(self._compiler.banned)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, self._compiler.num_bytes)
        return bits


def _to_lark(kind: str, text: str) -> str:
    if kind == "regex":
        return f"start: /{regex_to_lark(text, use_ascii='')}/"
    try:
        return any_to_lark(text)
    except Exception as error:  # the library raises its own untyped exceptions
        raise InputError(f"the grammar cannot be read: {_shown(str(error))}") from None


def _shown(text: str) -> str:
    """Of what the library says, which is about the caller's grammar: its first line."""
    return "".join(char for char in text.strip().partition("\n")[0] if char.isprintable())[:_MAX_SHOWN]
