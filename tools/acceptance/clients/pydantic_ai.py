"""pydantic-ai: `openai:` is the responses API, `openai-chat:` chat completions."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI
from pydantic_ai import Agent, BinaryContent, ImageUrl, NativeOutput, PromptedOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tools.acceptance.checks import (
    IMAGE,
    IMAGE_URL,
    KEY,
    MODEL,
    QUESTION,
    SCRIPTED_URL,
    SEEN,
    URL,
    VARIANT,
    city,
    raised,
    run,
)
from tools.acceptance.city import City

PICTURE = BinaryContent(IMAGE.read_bytes(), media_type="image/png")
CALLS: list[str] = []
SETTINGS: dict[str, Any] = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9}
if VARIANT == "openai-chat":
    SETTINGS |= {"seed": 3, "stop_sequences": ["never"], "presence_penalty": 0.5}


def weather(city: str, warm: bool) -> str:
    """The weather of a city."""
    CALLS.append(city)
    return "sunny"


def agent(url: str = URL, **options: Any) -> Any:
    kind: Any = OpenAIResponsesModel if VARIANT == "openai" else OpenAIChatModel
    api = AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0)
    model = kind(MODEL, provider=OpenAIProvider(openai_client=api))
    return Agent(model, **{"model_settings": {"max_tokens": 1024}, **options})


def ask(asked: Any = QUESTION, **options: Any) -> Any:
    return agent(**options).run_sync(asked)


def script(asked: Any = QUESTION, **options: Any) -> Any:
    CALLS.clear()
    return ask(asked, url=SCRIPTED_URL, **options)


def quick_start() -> str:
    agent = Agent(f"{VARIANT}:{MODEL}", instructions="Be concise, reply with one sentence.")
    return agent.run_sync('Where does "hello world" come from?').output


async def streamed() -> bool:
    async with agent().run_stream(QUESTION) as result:
        text = "".join([part async for part in result.stream_text(delta=True)])
    return text == (await agent().run(QUESTION)).output != ""


async def usage() -> bool:
    async with agent().run_stream(QUESTION) as result:
        await result.get_output()
    return result.usage.input_tokens > 0


async def streamed_call() -> bool:
    CALLS.clear()
    async with agent(SCRIPTED_URL, tools=[weather]).run_stream(QUESTION) as result:
        return await result.get_output() == SEEN and CALLS == ["Paris"]


run(
    {
        "quick start": quick_start,
        "chat": lambda: ask().output,
        "chat, streamed": streamed,
        "usage in a stream": usage,
        "image sent along": lambda: ask([PICTURE, QUESTION]).output == SEEN,
        "image by http: URL (s)": lambda: script([ImageUrl(IMAGE_URL), QUESTION]).usage.input_tokens > 30,
        "tools offered": lambda: ask(tools=[weather]).output,
        "two calls (s)": lambda: script("both?", tools=[weather]).output == SEEN and len(CALLS) == 2,
        "call, streamed (s)": streamed_call,
        "tool loop (s)": lambda: script(tools=[weather]).output == SEEN and CALLS == ["Paris"],
        "typed answer": lambda: city(ask(output_type=NativeOutput(City)).output),
        "typed answer by a tool": lambda: city(ask(output_type=City).output),
        "typed answer by the prompt (s)": lambda: city(script(output_type=PromptedOutput(City)).output),
        "reasoning (s)": lambda: [part.part_kind for part in script("think").response.parts] == ["thinking", "text"],
        "sampling options": lambda: ask(model_settings=SETTINGS).output,
        "an error's class, code and place": lambda: (
            "temperature" in str(raised(ModelHTTPError, lambda: ask(model_settings={"temperature": -1})).body)
        ),
    }
)
