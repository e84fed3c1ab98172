"""litellm, with the server as `hosted_vllm/` and as `openai/`."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm

from tools.acceptance.chat_checks import chat_checks, said
from tools.acceptance.checks import (
    DATA_URI,
    KEY,
    MODEL,
    QUESTION,
    RESPONSES_TOOL,
    SCRIPTED_URL,
    SEEN,
    URL,
    VARIANT,
    VECTORS_URL,
    city,
    look_by_response,
    raised,
    refused,
    run,
    unit,
    user,
)
from tools.acceptance.city import City

NAME = f"{VARIANT}/{MODEL}"
GIVEN: dict[str, Any] = {"model": NAME, "api_base": URL, "api_key": KEY, "num_retries": 0}


def chat(messages: Any = None, *, scripted: bool = False, **fields: Any) -> Any:
    """`hosted_vllm/` takes `additionalProperties` from tools, and the small model, which then may add properties of its
    own, adds them until it is cut: its forced calls are the script's."""
    scripted = scripted or (VARIANT == "hosted_vllm" and "tool_choice" in fields)
    given = {**GIVEN, "messages": messages or user(), "max_tokens": 1024, "temperature": 0}
    return litellm.completion(**given | ({"api_base": SCRIPTED_URL} if scripted else {}) | fields)


def quick_start() -> str:
    messages = [{"role": "user", "content": "Hello!"}]
    return litellm.completion(model=NAME, messages=messages, api_base=URL).choices[0].message.content


def respond(asked: Any, **fields: Any) -> Any:
    return litellm.responses(**GIVEN, input=asked, **fields)


def responses_streamed() -> bool:
    events = list(respond(QUESTION, stream=True))
    kinds = [str(getattr(event.type, "value", event.type)) for event in events]
    return "response.output_text.delta" in kinds and kinds[-1] == "response.completed"


async def at_once() -> bool:
    given = {**GIVEN, "max_tokens": 8}
    return all(await asyncio.gather(*(litellm.acompletion(**given, messages=user(f"{i}?")) for i in range(32))))


run(
    {
        "quick start": quick_start,
        **chat_checks(chat),
        "typed answer": lambda: city(said(chat(response_format=City))),
        "completions": lambda: litellm.text_completion(**GIVEN, prompt="a red", max_tokens=4).choices[0].text,
        "responses": lambda: respond(look_by_response(DATA_URI)).output_text == SEEN,
        "responses, streamed": responses_streamed,
        "responses: tools": lambda: city(
            respond(QUESTION, tools=[RESPONSES_TOOL], tool_choice="required").output[0].arguments
        ),
        "messages": lambda: litellm.anthropic.messages.create(**GIVEN, messages=user(), max_tokens=32)["content"][0],
        "embeddings (e)": lambda: (
            [
                unit(one["embedding"])
                for one in litellm.embedding(**{**GIVEN, "api_base": VECTORS_URL}, input=["a", "b"]).data
            ]
            == [True, True]
        ),
        "an error's class, code and place": lambda: (
            "temperature" in str(raised(litellm.BadRequestError, lambda: chat(temperature=-1)))
        ),
        "wrong key": refused("401 invalid_api_key", lambda: chat(api_key="sk-other")),
        "32 at once": at_once,
    }
)
