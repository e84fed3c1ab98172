"""Anthropic's own client for Python."""

from __future__ import annotations

from typing import Any

import anthropic

from tools.acceptance.checks import CITY, IMAGE_DATA, MODEL, QUESTION, SCRIPTED, SEEN, city, raised, refused, run, user
from tools.acceptance.city import City

client: Any = anthropic.Anthropic(max_retries=0)
script: Any = client.with_options(base_url=SCRIPTED)
TOOL = {"name": "weather", "description": "The weather of a city", "input_schema": CITY}
ONE = {"type": "tool", "name": "weather"}
LOOK = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE_DATA}}]


def ask(messages: Any = None, api: Any = client, **fields: Any) -> Any:
    answer = api.messages.create(**{"model": MODEL, "messages": messages or user(), "max_tokens": 1024, **fields})
    return type(answer).model_validate(answer.to_dict())


def quick_start() -> Any:
    message = anthropic.Anthropic().messages.create(
        max_tokens=1024,
        messages=[{"role": "user", "content": "Hello, Claude"}],
        model="claude-opus-5-5",
    )
    return message.content


def streamed() -> bool:
    with client.messages.stream(model=MODEL, max_tokens=64, messages=user()) as stream:
        text = "".join(stream.text_stream)
        return stream.get_final_message().content[0].text == text != ""


def streamed_call() -> bool:
    with script.messages.stream(model=MODEL, max_tokens=99, messages=user(), tools=[TOOL]) as stream:
        return city(stream.get_final_message().content[0].input)


def loop() -> bool:
    @anthropic.beta_tool
    def weather(city: str, warm: bool) -> str:
        """The weather of a city."""
        return "sunny"

    runner = script.beta.messages.tool_runner(model=MODEL, max_tokens=99, messages=user(), tools=[weather])
    return runner.until_done().content[0].text == SEEN


def real_loop() -> Any:
    first = ask(tools=[TOOL], tool_choice=ONE)
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "sunny"}
    more = [{"role": "assistant", "content": first.content}, *user([result])]
    return ask([*user(), *more], tools=[TOOL]).content


def thinking() -> bool:
    first, second = ask(user("think"), script).content
    return (first.thinking, second.text) == ("I look.", SEEN)


run(
    {
        "quick start": quick_start,
        "list of models": lambda: MODEL in [model.id for model in client.models.list()],
        "one model": lambda: client.models.retrieve(MODEL).id == MODEL,
        "image sent along": lambda: ask(user([*LOOK, {"type": "text", "text": QUESTION}])).content[0].text == SEEN,
        "tools offered": lambda: ask(tools=[TOOL]).content,
        "tool call (s)": lambda: city(ask(api=script, tools=[TOOL]).content[0].input),
        "two calls (s)": lambda: len(ask(user("both?"), script, tools=[TOOL]).content) == 2,
        "call, streamed (s)": streamed_call,
        "tool loop (s)": loop,
        "tool_choice: required": lambda: city(
            ask(tools=[TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True}).content[0].input
        ),
        "tool_choice: by name": lambda: city(ask(tools=[TOOL], tool_choice=ONE).content[0].input),
        "reasoning (s)": thinking,
        "messages": lambda: ask(system="Be brief.", stop_sequences=["never"]).content[0].text,
        "messages, streamed": streamed,
        "messages: tools": real_loop,
        "messages: typed answer": lambda: city(
            client.messages.parse(model=MODEL, max_tokens=1024, messages=user(), output_format=City).parsed_output
        ),
        "token count": lambda: (
            client.messages.count_tokens(model=MODEL, messages=user()).input_tokens
            == ask(max_tokens=1).usage.input_tokens
        ),
        "an error's class, code and place": lambda: (
            "temperature" in str(raised(anthropic.BadRequestError, lambda: ask(extra_body={"temperature": -1})))
        ),
        "wrong key": refused("401 invalid_api_key", lambda: ask(api=client.with_options(api_key="sk-other"))),
    }
)
