"""Sampling options: what each is, what it may be, where it can be given and when it is applied.

A new one is a field of `SamplingParams` and a row of `OPTIONS`: with these, HTTP, the command line, Python and the
tables of docs/serving.md have it, and tests fail until the sampler does it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import msgspec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.core.pooling import Pooling
from qwen3vl_disagg.core.readers import Flag, Number, Strings, TokenIdList, TokenNumbers, ValueKind, Words

Route = Literal["chat", "completion", "response", "messages"]
"""Routes of HTTP that sample: `/v1/chat/completions`, `/v1/completions`, `/v1/responses` and `/v1/messages`."""
ROUTES: tuple[Route, ...] = get_args(Route)
Step = Literal[
    "prompt",
    "logprobs",
    "bias",
    "penalties",
    "bans",
    "temperature",
    "top-k",
    "top-p",
    "min-p",
    "draw",
    "length",
    "text",
]
ORDER: tuple[Step, ...] = get_args(Step)
"""How a token comes about. `engine/sampler.py` draws it, without temperature the largest is taken; the engine counts
tokens, and whoever makes the text looks for stop strings in it."""
MAX_NEW_TOKENS = 2**20
MAX_SAMPLES = 128
"""Answers to one request, as OpenAI's."""
_LEAST_TOP_P = 1e-6


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are picked. `temperature == 0` is greedy; the defaults of all else switch it off.

    OPTIONS says what these may be: InputError naming the field, at whatever way they are made. One stop string may
    stand for a list of one.
    """

    n: int = 1
    """So many answers to the prompt, which is computed once. Answer i is that of the seed + i."""
    max_new_tokens: int = 128
    is_open_ended: bool = False
    """Nobody asked for so many: `max_new_tokens` is a bound, and shrinks to what there is room for."""
    min_tokens: int = 0
    """No end token before that many tokens, and no stop string that is complete before them."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one's probability are out."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token of the output; `frequency_penalty`: as often as it is there."""
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Positive logits of tokens of prompt and output are divided by it, others multiplied."""
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    """Token id -> what is added to its logit, from -100 to 100."""
    allowed_token_ids: list[int] | None = None
    """No other token may come, no end token either; but see `grammar`."""
    bad_words: list[str | list[int]] = msgspec.field(default_factory=list)
    """Texts, or the ids of their tokens, the last of which may not come behind the others. Whoever has the tokenizer
    makes ids of texts (`processing/bad_words.py`): the engine takes ids."""
    stop: list[str] = msgspec.field(default_factory=list)
    """The text ends before the first of these. Whoever makes the text looks for them: the engine has no tokenizer."""
    include_stop_str_in_output: bool = False
    """The text ends behind it, and with the text of a token of `stop_token_ids`."""
    skip_special_tokens: bool = True
    """False: what tokenizer.json calls special is text too, but for the token that ends the answer."""
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    """The answer ends with the first of these, as with an end token; it is no text."""
    seed: int | None = None
    ignore_eos: bool = False
    """Ban the end tokens, so that exactly `max_new_tokens` come."""
    cache_salt: str = ""
    """Whose request it is, as a digest: prefixes are shared among equal ones only."""
    logprobs: int | None = None
    """None: none. K >= 0: each token's logprob and the K most likely ones, from the raw distribution."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens but the first."""
    grammar: Grammar | None = None
    """What the answer must be. An end token comes only where it is whole, and there also in spite of `min_tokens`,
    `ignore_eos`, `allowed_token_ids` and `bad_words` if nothing else may. An answer that is cut, by its length or a
    stop string, may not be whole."""
    pooling: Pooling | None = None
    """Nothing is sampled: this is wanted of the prompt."""

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value is not None or DEFAULTS[name] is not None:
                msgspec.structs.force_setattr(self, name, option.kind.check(value, name))
        if self.min_tokens > self.max_new_tokens:
            problem = f"min_tokens is {self.min_tokens}, but only {self.max_new_tokens} may come"
            raise InputError(problem, param="min_tokens")
        if self.pooling is not None and self.n > 1:
            raise InputError("what is pooled of a prompt is one thing: n must be 1", param="n")
        for name, kind in NO_OPTIONS.items():
            if getattr(self, name) is not DEFAULTS[name] and not isinstance(getattr(self, name), kind):
                raise InputError(f"{name} must be a {kind.__name__}, not {getattr(self, name)!r}", param=name)


DEFAULTS: dict[str, Any] = {
    field.name: field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    for field in msgspec.structs.fields(SamplingParams)
}
"""None: it may be None."""
NO_OPTIONS: dict[str, type] = {"is_open_ended": bool, "cache_salt": str, "grammar": Grammar, "pooling": Pooling}
"""Fields that follow from the rest of a request; what they are."""


@dataclass(frozen=True, kw_only=True)
class SamplingOption:
    """A field of `SamplingParams` that can be asked for."""

    kind: ValueKind
    step: Step
    example: Any
    """A value that makes a difference."""
    about: str
    """Its line in docs/serving.md."""
    flag: str | None
    """Help of its flag, which has its name; None: it has no flag."""
    http: Mapping[Route, tuple[str, ...]] = field(default_factory=dict)
    """How it is spelled in a body, where not by its name. Of several that are given the first wins, all are checked."""
    not_set: tuple[int, ...] = ()
    """What clients send in a body for "not set", beside null."""
    means: Callable[[Any], Any] | None = None
    """What other values in a body stand for."""
    switch: Mapping[Route, str] = field(default_factory=dict)
    """A field of the body that must be true for it to count; alone it stands for 0."""
    is_checkpoints: bool = False
    """`generation_config.json` may give it."""

    def spellings(self, name: str, route: Route) -> tuple[str, ...]:
        return self.http.get(route, (name,))


def _no_bound(value: Any) -> Any:
    """-1 is off, as 0 is."""
    return 0 if value == -1 else value


def _least(value: Any) -> Any:
    """0 leaves the most likely token alone."""
    return _LEAST_TOP_P if value == 0 and not isinstance(value, bool) else value


def _from_below_zero(value: Any) -> Any:
    """As good a seed as any."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) + 2**63 if is_number and -(2**63) <= value < 0 and value == int(value) else value


_PENALTY = Number(-2, 2)

OPTIONS: dict[str, SamplingOption] = {
    "n": SamplingOption(
        kind=Number(1, MAX_SAMPLES, is_whole=True),
        step="prompt",
        example=2,
        about="so many answers to the one prompt ([below](#several-answers)); chat requests and completions only",
        flag=None,
    ),
    "max_new_tokens": SamplingOption(
        kind=Number(1, MAX_NEW_TOKENS, is_whole=True),
        step="length",
        example=1,
        about="tokens of the answer, at most; more than is left of the context is a 400. Not set over HTTP: what is"
        " left of the context, and of the room for keys and values, and at most `--max-answer-tokens`",
        flag="",
        http={
            "chat": ("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict"),
            "completion": ("max_tokens", "max_new_tokens", "n_predict"),
            "response": ("max_output_tokens",),
            "messages": ("max_tokens",),
        },
        not_set=(-1, -2),
    ),
    "min_tokens": SamplingOption(
        kind=Number(0, MAX_NEW_TOKENS, is_whole=True),
        step="bans",
        example=3,
        about="no end token before that many, and no stop string complete before them",
        flag="No end token and no stop string before that many tokens.",
        http=dict.fromkeys(ROUTES, ("min_tokens", "min_new_tokens")),
        not_set=(-1,),
    ),
    "temperature": SamplingOption(
        kind=Number(0, 100),
        step="temperature",
        example=0.5,
        about="0 is greedy",
        flag="0 is greedy.",
        is_checkpoints=True,
    ),
    "top_p": SamplingOption(
        kind=Number(_LEAST_TOP_P, 1),
        step="top-p",
        example=0.5,
        about="the most likely tokens that reach this probability together; 0 over HTTP: the most likely one alone",
        flag="",
        means=_least,
        is_checkpoints=True,
    ),
    "top_k": SamplingOption(
        kind=Number(0, 2**20, is_whole=True),
        step="top-k",
        example=3,
        about="so many of the most likely tokens; 0 (over HTTP also -1): all",
        flag="",
        means=_no_bound,
        is_checkpoints=True,
    ),
    "min_p": SamplingOption(
        kind=Number(0, 1),
        step="min-p",
        example=0.5,
        about="tokens less likely than this share of the most likely one's probability are out",
        flag="Leave out tokens less likely than this share of the most likely one's probability.",
        is_checkpoints=True,
    ),
    "presence_penalty": SamplingOption(
        kind=_PENALTY,
        step="penalties",
        example=0.5,
        about="over the answer, as OpenAI's",
        flag="From -2 to 2, as OpenAI's; likewise --frequency-penalty.",
    ),
    "frequency_penalty": SamplingOption(
        kind=_PENALTY,
        step="penalties",
        example=0.5,
        about="the same, as often as the token is there",
        flag="",
    ),
    "repetition_penalty": SamplingOption(
        kind=Number(1e-3, 1e3),
        step="penalties",
        example=1.5,
        about="over the whole prompt and answer, as in transformers",
        flag="Over prompt and answer, as in transformers; 1 is none.",
        http=dict.fromkeys(ROUTES, ("repetition_penalty", "repeat_penalty")),
        is_checkpoints=True,
    ),
    "logit_bias": SamplingOption(
        kind=TokenNumbers(1024),
        step="bias",
        example={5: 1.0},
        about="what is added to the logits of tokens; beyond -100 and 100 it is clamped",
        flag=None,
    ),
    "allowed_token_ids": SamplingOption(
        kind=TokenIdList(4096, least=1),
        step="bans",
        example=[2, 3],
        about="no other token may come: an end token only if it is among them, or where nothing else may come because a"
        " grammar is at its end",
        flag="No other token may come; repeat for several.",
    ),
    "bad_words": SamplingOption(
        kind=Words(1024, 256, 16384),
        step="bans",
        example=["circle"],
        about="of the tokens of each, as it stands and with a blank before it, the last one may not come behind the"
        " others. The same letters may come in other tokens, as in vLLM",
        flag="This text may not come, as it is tokenized; repeat for several.",
        http=dict.fromkeys(ROUTES, ("bad_words", "bad_words_ids")),
    ),
    "stop": SamplingOption(
        kind=Strings(16, 256),
        step="text",
        example=["circle"],
        about="the text ends before the first that is complete, `finish_reason` is `stop`, and `token_ids` end with the"
        " token that completed it",
        flag="The answer ends before this text; repeat for several.",
        http={"messages": ("stop_sequences",)},
    ),
    "include_stop_str_in_output": SamplingOption(
        kind=Flag(),
        step="text",
        example=True,
        about="the text ends behind the stop string, or with the text of the token of `stop_token_ids`",
        flag="The text ends behind --stop, not before it.",
        http=dict.fromkeys(ROUTES, ("include_stop_str_in_output", "no_stop_trim")),
    ),
    "skip_special_tokens": SamplingOption(
        kind=Flag(),
        step="text",
        example=False,
        about="false: special tokens, such as `<\\|box_start\\|>`, are text by their names. The end token only with"
        " `include_stop_str_in_output`",
        flag=None,
    ),
    "stop_token_ids": SamplingOption(
        kind=TokenIdList(64),
        step="length",
        example=[11],
        about="the answer ends with the first of these, `finish_reason` is `stop`; it is in `token_ids`, but no text."
        " Not before `min_tokens`",
        flag="The answer ends with this token; repeat for several.",
    ),
    "seed": SamplingOption(
        kind=Number(0, 2**63 - 1, is_whole=True),
        step="draw",
        example=7,
        about="the same seed gives the same answer, whatever else is in the batch (see below). Over HTTP -1 is none,"
        " and other numbers below 0 are seeds too",
        flag="The same seed gives the same answer.",
        not_set=(-1,),
        means=_from_below_zero,
    ),
    "ignore_eos": SamplingOption(
        kind=Flag(),
        step="bans",
        example=True,
        about="ban the end tokens: exactly `max_new_tokens` come",
        flag="Ban the end tokens, so that exactly --max-new-tokens come.",
    ),
    "logprobs": SamplingOption(
        kind=Number(0, 20, is_whole=True),
        step="logprobs",
        example=1,
        about="each token's log probability, and so many alternatives, from the distribution before all else; the end"
        " token has an entry too. Over HTTP as OpenAI's, each entry with its `token_id`",
        flag="Give each token's log probability and this many alternatives (with --json or --batch).",
        http={"chat": ("top_logprobs",), "response": ("top_logprobs",)},
        switch={"chat": "logprobs"},
    ),
    "prompt_logprobs": SamplingOption(
        kind=Number(0, 20, is_whole=True),
        step="prompt",
        example=1,
        about="the same of the prompt's tokens but the first, whole answers over HTTP only, as vLLM's. The prompt is"
        " computed from its beginning, whatever is cached of it",
        flag=None,
    ),
}
"""Name -> all that is said of it. In the order of the command line's help."""


def body_fields(route: Route) -> list[str]:
    """All spellings and switches of a route's body."""
    found = [name for own, option in OPTIONS.items() for name in option.spellings(own, route)]
    return found + [option.switch[route] for option in OPTIONS.values() if route in option.switch]
