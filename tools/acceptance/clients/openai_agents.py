"""openai-agents, by responses and by chat completions."""

from __future__ import annotations

from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from tools.acceptance.checks import (
    DATA_URI,
    MODEL,
    QUESTION,
    SCRIPTED_URL,
    SEEN,
    URL,
    VARIANT,
    city,
    look_by_response,
    refused,
    run,
)
from tools.acceptance.city import City

set_tracing_disabled(True)
CALLS: list[str] = []


@function_tool
def weather(city: Literal["Paris", "Rome"], warm: bool) -> str:
    """The weather of a city."""
    CALLS.append(city)
    return "sunny"


def agent(url: str = URL, settings: Any = None, **options: Any) -> Agent:
    CALLS.clear()
    kind: Any = OpenAIResponsesModel if VARIANT == "responses" else OpenAIChatCompletionsModel
    model = kind(MODEL, AsyncOpenAI(base_url=url, max_retries=0))
    model_settings = ModelSettings(max_tokens=1024, **settings or {})
    return Agent(name="Assistant", model=model, model_settings=model_settings, **options)


async def ask(asked: Any = QUESTION, **options: Any) -> Any:
    return (await Runner.run(agent(**options), asked)).final_output


def quick_start() -> Any:
    agent = Agent(name="Assistant", instructions="You are a helpful assistant")
    if VARIANT == "chat":
        agent.model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI())
    result = Runner.run_sync(agent, "Write a haiku about recursion in programming.")
    return result.final_output


async def streamed(**options: Any) -> Any:
    result = Runner.run_streamed(agent(**options), QUESTION)
    kinds = [event.type async for event in result.stream_events()]
    return "raw_response_event" in kinds and result.final_output


async def called(asked: str = QUESTION, times: int = 1, **options: Any) -> bool:
    return bool(await ask(asked, tools=[weather], **options)) and len(CALLS) == times


async def streamed_call() -> bool:
    return await streamed(url=SCRIPTED_URL, tools=[weather]) == SEEN and CALLS == ["Paris"]


async def typed() -> bool:
    return city(await ask(output_type=City))


async def image() -> bool:
    return await ask(look_by_response(DATA_URI)) == SEEN


async def reasoning() -> bool:
    result = await Runner.run(agent(SCRIPTED_URL), "think")
    return [item.type for item in result.new_items] == ["reasoning_item", "message_output_item"]


run(
    {
        "quick start": quick_start,
        "chat": lambda: ask(instructions="Be brief."),
        "chat, streamed": streamed,
        "image sent along": image,
        "tools offered": lambda: ask(tools=[weather]),
        "two calls (s)": lambda: called("both?", 2, url=SCRIPTED_URL),
        "call, streamed (s)": streamed_call,
        "tool loop (s)": lambda: called(url=SCRIPTED_URL),
        "tool_choice: required": lambda: called(settings={"tool_choice": "required", "parallel_tool_calls": False}),
        "tool_choice: by name": lambda: called(settings={"tool_choice": "weather"}),
        "typed answer": typed,
        "reasoning (s)": reasoning,
        "an error's class, code and place": refused("400 invalid_request", lambda: ask(settings={"temperature": -1})),
    }
)
