"""Requests whose prompt is text or token ids: `/v1/completions`, `/tokenize` and `/detokenize`, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.grammar import Grammar
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.prompt_options import read_salt
from qwen3vl_disagg.processing.request_fields import check_fields, is_one_of, no_choice, read_flag
from qwen3vl_disagg.serving.chat_request import check_model
from qwen3vl_disagg.serving.grammar_fields import read_grammar
from qwen3vl_disagg.serving.sampling_fields import SamplingFields

T = TypeVar("T")
MAX_PROMPTS = 128
"""Of a request, and so many answers to all of them."""
MAX_PROMPT_TOKENS = 2**21
"""Of several prompts together: they are admitted as one request, whatever the queue's own bound is."""
DEFAULT_TOKENS = 16
"""Of an answer whose request names no number, as OpenAI's."""

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True, tag="completion"):
    """`echo`: the text begins with the prompt. `is_scoring`: nothing but the prompt is wanted."""

    sampling: SamplingFields
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    echo: bool = False
    is_scoring: bool = False
    cache_salt: str = ""
    grammar: Grammar | None = None

    @property
    def num_scores(self) -> int | None:
        """Alternatives that each token of the prompt needs; None where nothing is told of it."""
        asked = [self.sampling.values.get("prompt_logprobs")]
        asked += [self.sampling.values.get("logprobs")] if self.echo else []
        return max((number for number in asked if number is not None), default=None)

    @property
    def tells_more(self) -> bool:
        """Than the text of answers."""
        more = self.echo or self.return_token_ids or self.sampling.wants_logprobs
        return more or self.num_scores is not None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Text, or a conversation in the form of a chat request, which has more fields."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    """This model family adds none."""
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


class TokenizeRequest(msgspec.Struct, frozen=True, tag="tokenize"):
    """Checked; what becomes tokens is looked at apart."""

    with_strings: bool = False


class DetokenizeRequest(msgspec.Struct, frozen=True, tag="detokenize"):
    pass


def convert(raw: Mapping[str, Any], kind: type[T]) -> T:
    """The body as a value of this type. InputError naming the place."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        raise InputError(f"{param or 'the body'}: {reason}", param=param) from None


def parse_completion(raw: dict[str, Any], *, model_names: Collection[str]) -> CompletionRequest:
    """InputError with `param`; 404 for another model's name. The prompts are looked at by `read_prompts`."""
    check_model(raw.get("model"), model_names)
    if raw.get("prompt") is None:
        raise InputError("prompt is missing", param="prompt")
    check_fields(raw, "completion", besides=no_choice(raw))
    echo, stream = _flag(raw, "echo"), _flag(raw, "stream")
    is_scoring = echo and is_one_of(raw.get("max_tokens"), (0,))
    sampling = SamplingFields.read({**raw, "max_tokens": None if is_scoring else raw.get("max_tokens")}, "completion")
    for name in ("prompt_logprobs", "logprobs"):
        if stream and name in sampling.values and (echo or name == "prompt_logprobs"):
            raise InputError("what is said of the prompt is not streamed", param=name)
    options = raw.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InputError("stream_options must be an object", param="stream_options")
    grammar = None if is_scoring else read_grammar(raw, (), "auto", "")
    request = CompletionRequest(
        sampling=sampling,
        stream=stream,
        include_usage=_flag(options, "include_usage", "stream_options."),
        continuous_usage=_flag(options, "continuous_usage_stats", "stream_options."),
        return_token_ids=_flag(raw, "return_token_ids"),
        echo=echo,
        is_scoring=is_scoring,
        cache_salt=read_salt(raw.get("cache_salt")),
        grammar=grammar and msgspec.structs.replace(grammar, is_from_start=True),
    )
    values = dict(sampling.values)
    if is_scoring:
        values["max_new_tokens"] = 1  # computed and left out
    elif values.get("max_new_tokens") is None:
        values["max_new_tokens"] = max(DEFAULT_TOKENS, values.get("min_tokens", 0))
    if request.num_scores is not None:
        values["prompt_logprobs"] = request.num_scores
    spelled = {"max_new_tokens": "max_tokens", **sampling.spelled}
    return msgspec.structs.replace(request, sampling=SamplingFields(values, spelled))


def parse_tokenize(raw: dict[str, Any], *, model_names: Collection[str]) -> TokenizeRequest:
    """InputError with `param`; 404 for another model's name."""
    body = convert(raw, TokenizeBody)
    check_model(body.model, model_names)
    if (body.prompt is None) == (body.messages is None):
        raise InputError("there must be either a prompt or messages", param="prompt")
    return TokenizeRequest(bool(body.return_token_strs))


def chat_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a request for tokens has of a chat request."""
    return {
        name: value for name, value in raw.items() if name not in ("add_special_tokens", "return_token_strs", "prompt")
    }


def check_prompt_tokens(num_tokens: int, where: str, *, is_first: bool, times: int = 1) -> None:
    """InputError for more than the prompts up to here may have, each of which is told so many `times`; but one prompt
    that is told once is bound by the context alone."""
    if num_tokens * times > MAX_PROMPT_TOKENS and (times > 1 or not is_first):
        told = f", told {times} times" if times > 1 else ""
        reason = f"the prompts up to here have {num_tokens} tokens{told}: a request may have {MAX_PROMPT_TOKENS}"
        raise InputError(reason, param=where)


def read_prompts(given: Any, processor: Processor, *, times: int = 1) -> list[Prompt]:
    """A text, a list of token ids, or up to MAX_PROMPTS of either kind, told `times` times each. InputError naming the
    place."""
    is_one = isinstance(given, str) or (isinstance(given, list) and given and not isinstance(given[0], (str, list)))
    prompts = [given] if is_one else given
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
        reason = f"prompt must be a text or a list of token ids, or a list of 1 to {MAX_PROMPTS} of these"
        raise InputError(reason, param="prompt")
    found, num_tokens = list[Prompt](), 0
    for number, prompt in enumerate(prompts):
        where = "prompt" if is_one else f"prompt[{number}]"
        token_ids = processor.text_ids(prompt, where) if isinstance(prompt, str) else read_ids(prompt, processor, where)
        if not token_ids:
            raise InputError(f"{where} is empty", param=where)
        num_tokens += len(token_ids)
        check_prompt_tokens(num_tokens, where, is_first=not number, times=times)
        found.append(Prompt(token_ids, [], []))
    return found


def read_ids(given: Any, processor: Processor, where: str) -> list[int]:
    """A prompt's token ids. InputError naming the place."""
    config, context = processor.config, processor.max_model_len
    size = config.text.vocab_size
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < size for token in given):
        raise InputError(f"{where} must be a text, or a list of token ids from 0 to {size - 1}", param=where)
    pads = {config.image_token_id, config.video_token_id}.intersection(given)
    if pads:
        reason = f"{where} has a placeholder of images or clips, {min(pads)}: they go with /v1/chat/completions"
        raise InputError(reason, param=where)
    if len(given) >= context:
        reason = f"{where} has {len(given)} tokens, the context is {context}"
        raise InputError(reason, param=where, code="context_length_exceeded")
    return given


def _flag(raw: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    return False if raw.get(name) is None else read_flag(raw[name], f"{prefix}{name}")
