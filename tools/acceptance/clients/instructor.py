"""instructor, in its ways of asking for a form."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import instructor
from instructor import Mode
from openai import OpenAI
from pydantic import BaseModel

from tools.acceptance.checks import MODEL, QUESTION, SCRIPTED_URL, URL, city, run, user
from tools.acceptance.city import City


class Product(BaseModel):
    name: str
    price: float
    in_stock: bool


def ask(mode: Mode, *, scripted: bool = False, **fields: Any) -> Any:
    api = OpenAI(max_retries=0, base_url=SCRIPTED_URL if scripted else URL)
    client: Any = instructor.from_openai(api, mode=mode)
    given = {"model": MODEL, "response_model": City, "messages": user(), "max_retries": 0, "max_tokens": 1024}
    return client.chat.completions.create(**given | fields)


def quick_start() -> bool:
    """Over the script: the small model does not end the text of a name."""
    os.environ["OPENAI_BASE_URL"] = SCRIPTED_URL
    client: Any = instructor.from_provider("openai/gpt-4o-mini")
    product = client.chat.completions.create(
        response_model=Product,
        messages=[{"role": "user", "content": "iPhone 15 Pro, $999, available now"}],
    )
    return isinstance(product, Product)


def two_calls() -> bool:
    asked = {"response_model": Iterable[City], "messages": user("both?")}
    return [city(one) for one in ask(Mode.PARALLEL_TOOLS, scripted=True, **asked)] == [True, True]


def by_response() -> bool:
    client: Any = instructor.from_openai(OpenAI(max_retries=0), mode=Mode.RESPONSES_TOOLS)
    return city(client.responses.create(model=MODEL, input=QUESTION, response_model=City, max_retries=0))


run(
    {
        "quick start (s)": quick_start,
        "chat, streamed": lambda: city(list(ask(Mode.TOOLS, response_model=instructor.Partial[City], stream=True))[-1]),
        "two calls (s)": two_calls,
        "tool_choice: by name": lambda: city(ask(Mode.TOOLS)),
        "json_object (s)": lambda: city(ask(Mode.JSON, scripted=True)),
        "json_schema": lambda: city(ask(Mode.JSON_SCHEMA)),
        "typed answer by a tool": lambda: city(ask(Mode.TOOLS_STRICT)),
        "typed answer by the prompt (s)": lambda: city(ask(Mode.MD_JSON, scripted=True)),
        "responses: tools": by_response,
    }
)
