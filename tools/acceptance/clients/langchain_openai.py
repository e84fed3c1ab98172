"""langchain-openai."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from tools.acceptance.checks import (
    DATA_URI,
    IMAGE_DATA,
    IMAGE_URL,
    MODEL,
    QUESTION,
    SCRIPTED_URL,
    SEEN,
    VECTORS_URL,
    city,
    look,
    refused,
    run,
    unit,
)
from tools.acceptance.city import City


@tool(args_schema=City)
def weather(city: str, warm: bool) -> str:
    """The weather of a city."""
    return "sunny"


def model(**fields: Any) -> Any:
    return ChatOpenAI(**{"model": MODEL, "max_tokens": 1024, "temperature": 0, "max_retries": 0, **fields})


chat, script = model(), model(base_url=SCRIPTED_URL)
offered = script.bind_tools([weather])
forced = chat.bind_tools([weather], tool_choice="any", strict=True)
new = ChatOpenAI(model=MODEL, use_responses_api=True, max_retries=0)
BLOCKS = [{"type": "image", "base64": IMAGE_DATA, "mime_type": "image/png"}, {"type": "text", "text": QUESTION}]


def quick_start() -> Any:
    llm = ChatOpenAI(model="gpt-5.5", stream_usage=True)
    messages = [
        ("system", "You are a helpful translator. Translate the user sentence to French."),
        ("human", "I love programming."),
    ]
    return llm.invoke(messages).content


def streamed_call() -> bool:
    first, *rest = offered.stream(QUESTION)
    return city(sum(rest, start=first).tool_calls[0]["args"])


def loop() -> bool:
    first = offered.invoke(QUESTION)
    return offered.invoke([HumanMessage(QUESTION), first, weather.invoke(first.tool_calls[0])]).content == SEEN


run(
    {
        "quick start": quick_start,
        "chat": lambda: all(answer.content for answer in chat.batch([QUESTION] * 8)),
        "chat, streamed": lambda: (
            "".join(chunk.content for chunk in chat.stream(QUESTION)) == chat.invoke(QUESTION).content
        ),
        "usage in a stream": lambda: any(chunk.usage_metadata for chunk in model(stream_usage=True).stream(QUESTION)),
        "image sent along": lambda: (
            chat.invoke(look(DATA_URI)).content == chat.invoke([HumanMessage(BLOCKS)]).content == SEEN
        ),
        "image by http: URL (s)": lambda: script.invoke(look(IMAGE_URL)).usage_metadata["input_tokens"] > 30,
        "tools offered": lambda: chat.bind_tools([weather]).invoke(QUESTION).content,
        "tool call (s)": lambda: city(offered.invoke(QUESTION).tool_calls[0]["args"]),
        "two calls (s)": lambda: len(offered.invoke("both?").tool_calls) == 2,
        "call, streamed (s)": streamed_call,
        "tool loop (s)": loop,
        "tool_choice: required": lambda: city(forced.invoke(QUESTION).tool_calls[0]["args"]),
        "tool_choice: by name": lambda: city(
            chat.bind_tools([weather], tool_choice="weather", strict=True).invoke(QUESTION).tool_calls[0]["args"]
        ),
        "parallel_tool_calls: false": lambda: (
            len(forced.bind(parallel_tool_calls=False).invoke(QUESTION).tool_calls) == 1
        ),
        "json_object (s)": lambda: city(script.with_structured_output(City, method="json_mode").invoke("JSON, please")),
        "json_schema": lambda: city(chat.with_structured_output(City, method="json_schema").invoke(QUESTION)),
        "typed answer": lambda: city(chat.with_structured_output(City).invoke(QUESTION)),
        "typed answer by a tool": lambda: city(
            chat.with_structured_output(City, method="function_calling").invoke(QUESTION)
        ),
        "log probabilities": lambda: (
            chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
        ),
        "n = 2": lambda: len(model(n=2, temperature=1).generate([[HumanMessage(QUESTION)]]).generations[0]) == 2,
        "sampling options": lambda: (
            model(seed=3, top_p=0.9, presence_penalty=0.5).invoke(QUESTION).content
            and chat.bind(stop=["e"]).invoke(QUESTION).response_metadata["finish_reason"] == "stop"
        ),
        "completions": lambda: OpenAI(model=MODEL, max_tokens=4, max_retries=0).invoke("a red"),
        "responses": lambda: new.invoke(look(DATA_URI)).text == SEEN,
        "responses, streamed": lambda: "".join(chunk.text for chunk in new.stream(QUESTION)),
        "responses: tools": lambda: city(
            new.bind_tools([weather], tool_choice="any", strict=True).invoke(QUESTION).tool_calls[0]["args"]
        ),
        "responses: typed answer": lambda: city(new.with_structured_output(City).invoke(QUESTION)),
        "embeddings (e)": lambda: unit(
            OpenAIEmbeddings(
                model=MODEL, base_url=VECTORS_URL, check_embedding_ctx_length=False, max_retries=0
            ).embed_query("a")
        ),
        "an error's class, code and place": refused(
            "400 invalid_request", lambda: chat.bind(temperature=-1).invoke(QUESTION)
        ),
    }
)
