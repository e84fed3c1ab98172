"""OpenAI's own client for Python."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import openai

from tools.acceptance.chat_checks import chat_checks, said
from tools.acceptance.checks import (
    DATA_URI,
    MODEL,
    QUESTION,
    RESPONSES_TOOL,
    SCRIPTED_URL,
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

client: Any = openai.OpenAI(max_retries=0)
script: Any = client.with_options(base_url=SCRIPTED_URL)


def chat(messages: Any = None, *, api: Any = client, scripted: bool = False, **fields: Any) -> Any:
    given = {"model": MODEL, "messages": messages or user(), "max_tokens": 1024, "temperature": 0}
    return (script if scripted else api).chat.completions.create(**given | fields)


def respond(asked: Any = QUESTION, **fields: Any) -> Any:
    answer = client.responses.create(**{"model": MODEL, "input": asked, **fields})
    return type(answer).model_validate(answer.to_dict())


def quick_start() -> Any:
    client = openai.OpenAI()
    response = client.responses.create(
        model="gpt-5.5",
        instructions="You are a coding assistant that talks like a pirate.",
        input="How do I check if a Python object is an instance of a class?",
    )
    completion = client.chat.completions.create(
        model="gpt-5.5",
        messages=[
            {"role": "developer", "content": "Talk like a pirate."},
            {"role": "user", "content": "How do I check if a Python object is an instance of a class?"},
        ],
    )
    return response.status in ("completed", "incomplete") and isinstance(said(completion), str)


def typed() -> bool:
    given: dict[str, Any] = {"model": MODEL, "messages": user(), "response_format": City}
    with client.chat.completions.stream(**given) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    return city(streamed) and city(client.chat.completions.parse(**given).choices[0].message.parsed)


def typed_call() -> bool:
    tool = openai.pydantic_function_tool(City, name="weather")
    with script.chat.completions.stream(model=MODEL, messages=user(), tools=[tool]) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls
    return city(call.function.parsed_arguments)


def more_fields() -> bool:
    """What vLLM has beside OpenAI's fields."""
    first = said(chat()).split()[0]
    only = chat(extra_body={"allowed_token_ids": [50, 51], "return_token_ids": True}, max_tokens=4).choices[0]
    chosen = said(chat(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}))
    seeded = chat(extra_body={"top_k": 5, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True}, max_tokens=9)
    assert first not in said(chat(extra_body={"bad_words": [first]}))
    assert set(only.token_ids) <= {50, 51}
    return chosen in ("yes", "no") and seeded.usage.completion_tokens == 9


def completions() -> bool:
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 3, "temperature": 0}
    first, second = client.completions.create(prompt=["a red", "a"], echo=True, logprobs=2, **given).choices
    streamed = client.completions.create(prompt=[65, 66], stream=True, **given)
    assert first.text.startswith("a red")
    assert first.logprobs.token_logprobs[0] is None
    return second.index == 1 and "".join(chunk.choices[0].text for chunk in streamed) != ""


def responses_streamed() -> bool:
    with client.responses.stream(model=MODEL, input=QUESTION) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        return stream.get_final_response().output_text == text != ""


def responses_loop() -> str:
    first = respond(user(), tools=[RESPONSES_TOOL], tool_choice="required", parallel_tool_calls=False)
    [call] = first.output
    assert city(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    return respond([*user(), *first.output, result], tools=[RESPONSES_TOOL]).output_text


def errors() -> bool:
    wrong = raised(openai.BadRequestError, lambda: chat(temperature=-1))
    other = raised(openai.NotFoundError, lambda: chat(model="other"))
    long = raised(openai.BadRequestError, lambda: chat(max_tokens=10**6))
    assert (wrong.code, wrong.param, other.code) == ("invalid_request", "temperature", "model_not_found")
    return long.code == "context_length_exceeded" and bool(long.request_id)


async def at_once() -> bool:
    async with openai.AsyncOpenAI(max_retries=0) as api:

        async def one(number: int) -> str:
            given: Any = {"model": MODEL, "messages": user(f"{number}: {QUESTION}"), "max_tokens": 16}
            stream = await api.chat.completions.create(**given, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return all(await asyncio.gather(*map(one, range(32))))


async def cancelled() -> bool:
    """Streams that are closed, and requests that are given up, leave their places at once: each twice as many as the
    server has."""
    async with openai.AsyncOpenAI(max_retries=0) as api:
        given: dict[str, Any] = {"model": MODEL, "messages": user(), "extra_body": {"ignore_eos": True}}
        for stream in (True, False):
            tasks = [
                asyncio.create_task(api.chat.completions.create(**given, max_tokens=1000, stream=stream))
                for _ in range(32)
            ]
            if stream:
                first: Any = await tasks[0]
                await anext(aiter(first))
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()
            for answer in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(answer, openai.AsyncStream):
                    await answer.close()
        began = time.monotonic()
        await api.chat.completions.create(**given, max_tokens=1)
        return time.monotonic() - began < 2


run(
    {
        "quick start": quick_start,
        "list of models": lambda: MODEL in [model.id for model in client.models.list()],
        "one model": lambda: client.models.retrieve(MODEL).id == MODEL,
        **chat_checks(chat),
        "typed answer": typed,
        "typed answer by a tool (s)": typed_call,
        "prefix of an answer": lambda: said(
            chat(
                [*user(), {"role": "assistant", "content": "red"}],
                extra_body={"add_generation_prompt": False, "continue_final_message": True, "min_tokens": 2},
            )
        ),
        "fields of vLLM": more_fields,
        "completions": completions,
        "responses": lambda: respond(look_by_response(DATA_URI), store=True).output_text == "red circle",
        "responses, streamed": responses_streamed,
        "responses: tools": responses_loop,
        "responses: typed answer": lambda: city(
            client.responses.parse(model=MODEL, input=QUESTION, text_format=City).output_parsed
        ),
        "embeddings (e)": lambda: (
            [
                unit(one.embedding)
                for one in client.with_options(base_url=VECTORS_URL)
                .embeddings.create(model=MODEL, input=["a", "b"])
                .data
            ]
            == [True, True]
        ),
        "embeddings of a model that answers": refused(
            "400 unsupported_task", lambda: client.embeddings.create(model=MODEL, input="a")
        ),
        "an error's class, code and place": errors,
        "wrong key": refused("401 invalid_api_key", lambda: chat(api=client.with_options(api_key="sk-other"))),
        "32 at once": at_once,
        "cancelled": cancelled,
    }
)
