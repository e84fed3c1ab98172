"""`GET /openapi.json`: what the server takes and answers, made from what reads and writes it.

Answers are the msgspec types that are sent. Bodies of chat and completion requests follow from the table of fields and
that of sampling options; of what these leave to a reader of its own the document says no more than it must. A body that
fits it may still be refused: an image that cannot be decoded, a prompt that is too long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from qwen3vl_disagg.core.readers import Flag, Number, OneOf, Strings, TokenIdList, TokenNumbers, Words
from qwen3vl_disagg.core.sampling_params import OPTIONS, Route
from qwen3vl_disagg.processing.request_fields import FIELDS, BuiltField, Place, RefusedField
from qwen3vl_disagg.serving.completion_request import MAX_PROMPTS, DetokenizeBody, TokenizeBody
from qwen3vl_disagg.serving.errors import ErrorEnvelope, MessagesError
from qwen3vl_disagg.serving.intake import TARGET_HEADER, TIMEOUT_HEADER
from qwen3vl_disagg.serving.messages_answer import MessagesBody, TokenCount
from qwen3vl_disagg.serving.metrics import METRICS_PATH
from qwen3vl_disagg.serving.pooling_request import MAX_INPUTS
from qwen3vl_disagg.serving.responses import ResponseBody
from qwen3vl_disagg.serving.trace import LIVE_DATA_PATH, MAX_SECONDS, TRACE_PATH
from qwen3vl_disagg.serving.types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    DetokenizedText,
    Embeddings,
    Health,
    Model,
    ModelList,
    NotReady,
    Ranking,
    ReadyState,
    Scores,
    TokenizedText,
    Version,
)
from qwen3vl_disagg.serving.ui import LIVE_PATH, UI_PATH

_REF = "#/components/schemas/{name}"
_ANYWHERE = {
    401: "The server has keys, and the request shows none of them.",
    403: "A Host or an Origin that is not served.",
    405: "This path does not take this method.",
    431: "The headers are too large.",
    500: "A fault of the server.",
    503: "Not ready, going down, or full.",
}
_OF_BODIES = {
    400: "Something of the request is wrong; `param` names the place.",
    404: "No model of this name.",
    408: "The headers or the body came too slowly.",
    413: "The body, or something in it, is too large.",
    415: "No Content-Type, or another than JSON.",
    429: "Too much at once.",
    504: "The request took longer than it may.",
}
_TEXT: dict[str, Any] = {"type": "string"}
_EVENT: dict[str, Any] = {"type": "object", "properties": {"event": _TEXT, "data": _TEXT}, "required": ["data"]}
"""One of a stream; before OpenAPI 3.2 a schema is of each."""
_CHUNKS = "events, each a {kind}Chunk in one `data:` line"
_TYPES = (
    *(ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, ResponseBody, TokenizedText, DetokenizedText),
    *(Model, ModelList, Version, Health, ReadyState, NotReady, ErrorEnvelope, TokenizeBody, DetokenizeBody),
    *(MessagesBody, TokenCount, MessagesError, Embeddings, Ranking, Scores),
)


def document(model_names: Sequence[str], version: str, *, has_keys: bool) -> dict[str, Any]:
    """The whole of it, as JSON."""
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template=_REF)
    model = {"enum": [*model_names, None]}
    for name in ("TokenizeBody", "DetokenizeBody"):
        schemas[name]["properties"]["model"] = model
    messages = {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role"]}}
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    prompts = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"anyOf": [_TEXT, ids]}}
    schemas["ChatBody"] = _body("request", "chat", {"model": model, "messages": messages}, ["messages"])
    prompt = {"anyOf": [_TEXT, ids, prompts]}
    schemas["CompletionBody"] = _body("completion", "completion", {"model": model, "prompt": prompt}, ["prompt"])
    items = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"type": "object"}}]}
    schemas["ResponseRequestBody"] = _body("response", "response", {"model": model, "input": items}, ["input"])
    own = {"model": model, "messages": messages}
    schemas["CountBody"] = _body("messages", "messages", own, ["messages"])
    schemas["MessagesRequestBody"] = {**schemas["CountBody"], "required": ["messages", "max_tokens"]}
    one = {"anyOf": [_TEXT, {"type": "object"}]}
    several = {"anyOf": [one, _inputs(one)]}
    inputs = {"anyOf": [ids, *several["anyOf"], _inputs(ids)]}
    schemas["EmbeddingsBody"] = _body("embeddings", None, {"model": model, "input": inputs}, [])
    schemas["RerankBody"] = _body(
        "rerank", None, {"model": model, "query": one, "documents": several}, ["query", "documents"]
    )
    schemas["ScoreBody"] = _body("score", None, {"model": model, "documents": several}, [])
    which = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": list(model_names)}}
    paths: dict[str, Any] = {
        "/v1/chat/completions": {"post": _post("chat", "ChatBody", "ChatCompletion", events=_CHUNKS)},
        "/v1/completions": {"post": _post("completion", "CompletionBody", "Completion", events=_CHUNKS)},
        "/v1/responses": {"post": _post("response", "ResponseRequestBody", "ResponseBody", events="typed events")},
        "/v1/messages": {
            "post": _post("messages", "MessagesRequestBody", "MessagesBody", events="events", error="MessagesError")
        },
        "/v1/messages/count_tokens": {"post": _post("count", "CountBody", "TokenCount", error="MessagesError")},
        "/v1/embeddings": {"post": _post("embeddings", "EmbeddingsBody", "Embeddings")},
        "/v1/rerank": {"post": _post("rerank", "RerankBody", "Ranking")},
        "/v1/score": {"post": _post("score", "ScoreBody", "Scores")},
        "/tokenize": {"post": _post("tokenize", "TokenizeBody", "TokenizedText")},
        "/detokenize": {"post": _post("detokenize", "DetokenizeBody", "DetokenizedText")},
        "/v1/models": {"get": _get("models", "ModelList")},
        "/v1/models/{name}": {"parameters": [which], "get": _get("model", "Model", {404: _OF_BODIES[404]})},
        "/version": {"get": _get("version", "Version")},
        METRICS_PATH: {"get": _text("metrics", "text/plain", "application/openmetrics-text")},
        UI_PATH: {"get": _text("ui", "text/html") | {"security": []}},
        LIVE_PATH: {"get": _text("ui_live", "text/html") | {"security": []}},
        TRACE_PATH: {"get": _traced("trace", "seconds", MAX_SECONDS)},
        LIVE_DATA_PATH: {"get": _traced("live", "after", 2.0**53)},
        "/health": {"get": _get("health", "Health") | {"security": []}},
        "/ready": {"get": _ready() | {"security": []}},
    }
    components: dict[str, Any] = {"schemas": schemas}
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "qwen3vl-disagg", "version": version},
        "paths": paths,
        "components": components,
    }
    if has_keys:
        key = {"type": "apiKey", "in": "header", "name": "x-api-key"}
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}, "key": key}
        whole["security"] = [{"bearer": []}, {"key": []}]
    return whole


# ---- operations ----


def _answer(text: str, kind: str, *, more: Sequence[str] = (), is_streamed: bool = False) -> dict[str, Any]:
    headers = {name: {"schema": _TEXT} for name in ("X-Request-ID", *more)}
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF.format(name=kind)}}}
    if is_streamed:
        content["text/event-stream"] = {"schema": _EVENT}
    return {"description": text, "headers": headers, "content": content}


def _errors(texts: Mapping[int, str], kind: str = "ErrorEnvelope") -> dict[str, Any]:
    more = {401: ["WWW-Authenticate"], 405: ["Allow"], 429: ["Retry-After"], 503: ["Retry-After"]}
    return {str(status): _answer(text, kind, more=more.get(status, [])) for status, text in sorted(texts.items())}


def _get(name: str, kind: str, errors: Mapping[int, str] | None = None) -> dict[str, Any]:
    return {"operationId": name, "responses": {"200": _answer("OK", kind), **_errors({**_ANYWHERE, **(errors or {})})}}


def _text(name: str, *kinds: str) -> dict[str, Any]:
    made = _get(name, "Health")
    made["responses"]["200"]["content"] = {kind: {"schema": _TEXT} for kind in kinds}
    return made


def _traced(name: str, query: str, most: float) -> dict[str, Any]:
    hidden = "A Host or an Origin that is not served; or `hidden`: with --hide-cache-hits there is nothing to see."
    made = _get(name, "Health", {400: _OF_BODIES[400], 403: hidden, 429: _OF_BODIES[429]})
    made["responses"]["200"]["content"] = {"application/json": {"schema": {"type": "object"}}}
    number = {"type": "number", "exclusiveMinimum" if query == "seconds" else "minimum": 0, "maximum": most}
    made["parameters"] = [{"name": query, "in": "query", "schema": number}]
    return made


def _ready() -> dict[str, Any]:
    made = _get("ready", "ReadyState")
    made["responses"]["503"] = _answer("Not ready; `reasons` say why.", "NotReady", more=["Retry-After"])
    return made


def _post(name: str, body: str, kind: str, *, events: str = "", error: str = "ErrorEnvelope") -> dict[str, Any]:
    """`events`: what a stream consists of, where there is one."""
    text = f"With `stream: true` {events.format(kind=kind)}." if events else "OK"
    limit = {"type": "integer", "minimum": 1, "maximum": 86_400_000}
    return {
        "operationId": name,
        "parameters": [{"name": name, "in": "header", "schema": limit} for name in (TIMEOUT_HEADER, TARGET_HEADER)],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _REF.format(name=body)}}},
        },
        "responses": {
            "200": _answer(text, kind, is_streamed=bool(events)),
            **_errors({**_ANYWHERE, **_OF_BODIES}, error),
        },
    }


# ---- bodies ----


def _body(place: Place, route: Route | None, own: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """What the tables say of a body; `own`: fields that they do not say more of than that they are there."""
    switches = () if route is None else (option.switch.get(route) for option in OPTIONS.values())
    flags = ("stream", "return_token_ids", "echo", "return_documents", *switches)
    objects = ("stream_options", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs")
    properties: dict[str, Any] = {}
    for name, treatment in FIELDS[place].items():
        if isinstance(treatment, RefusedField):
            properties[name] = {"enum": [None, *treatment.neutral]}
        elif isinstance(treatment, BuiltField):
            kind = _schema(treatment.read)
            kind = {"type": "boolean"} if name in flags else {"type": "object"} if name in objects else kind
            properties[name] = _or_null(kind)
    for name, option in OPTIONS.items():
        for spelling in () if route is None else option.spellings(name, route):
            if isinstance(FIELDS[place].get(spelling), RefusedField):
                continue
            choices = [_widened(option.means, _schema(option.kind))]
            choices += [{"enum": list(option.not_set)}] if option.not_set else []
            properties[spelling] = {"anyOf": [*choices, {"type": "null"}]}
    return {"type": "object", "properties": {**properties, **own}, "required": list(required)}


def _inputs(each: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": each}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def _schema(kind: object) -> dict[str, Any]:
    """Of values as a reader takes them; of those of a reader that is not known here nothing."""
    match kind:
        case Number():
            number = "integer" if kind.is_whole else "number"
            return {"type": number, "minimum": kind.low, "maximum": kind.high}
        case Flag():
            return {"type": "boolean"}
        case OneOf():
            return {"enum": list(kind.words)}
        case Strings():
            one = {"type": "string", "minLength": 1, "maxLength": kind.most_chars}
            each = {"anyOf": [one, _schema(TokenIdList(kind.most_chars, least=1))]} if isinstance(kind, Words) else one
            return {"anyOf": [one, {"type": "array", "maxItems": kind.most, "items": each}]}
        case TokenIdList():
            ids = {"type": "integer", "minimum": 0}
            return {"type": "array", "minItems": kind.least, "maxItems": kind.most, "items": ids}
        case TokenNumbers():
            names = {"pattern": "^[0-9]{1,9}$"}
            number_of = {"type": "number"}
            return {
                "type": "object",
                "maxProperties": kind.most,
                "propertyNames": names,
                "additionalProperties": number_of,
            }
    return {}


def _widened(means: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """Where other values stand for some below the least one, down to the lowest of these."""
    if means is None or "minimum" not in schema:
        return schema
    low = schema["minimum"]
    for value in (0, -1, -(2**63)):
        meant = means(value)
        if value < low and isinstance(meant, (int, float)) and schema["minimum"] <= meant <= schema["maximum"]:
            low = value
    return {**schema, "minimum": low}
