"""Checks of clients that give OpenAI's own objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.acceptance.checks import CLIP_URI, DATA_URI, FORMAT, IMAGE, IMAGE_URL, SEEN, TOOL, Check, city, look, user


def said(answer: Any) -> str:
    return answer.choices[0].message.content


def calls(answer: Any) -> list[Any]:
    return answer.choices[0].message.tool_calls


def arguments(answer: Any) -> str:
    return calls(answer)[0].function.arguments


def deltas(chunks: Any) -> list[Any]:
    return [chunk.choices[0].delta for chunk in chunks if chunk.choices]


def joined(chunks: Any, name: str = "content") -> str:
    return "".join(getattr(delta, name, None) or "" for delta in deltas(chunks))


def chat_checks(chat: Callable[..., Any]) -> dict[str, Check]:
    """`chat(messages, scripted=.., **fields)`: an answer, or with `stream` its chunks."""

    def loop() -> bool:
        first = chat(tools=[TOOL], scripted=True).choices[0].message
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"}
        return said(chat([*user(), first, result], tools=[TOOL], scripted=True)) == SEEN

    def logprobs() -> bool:
        told = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
        return bool(told) and all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in told)

    def sampling() -> bool:
        text = said(chat())
        before, piece = text.partition(text[3:6])[:2]
        same, *others = [said(chat(temperature=2, seed=seed, max_tokens=20)) for seed in (5, 5, 6, 7, 8)]
        one = chat(max_tokens=None, max_completion_tokens=1).usage.completion_tokens
        chat(presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"50": -100}, user="me")
        assert others[0] == same
        assert set(others) != {same}
        return one == 1 and before != "" and said(chat(stop=piece)) == before

    return {
        "chat": lambda: said(chat([{"role": "system", "content": "Be brief."}, *user()])),
        "chat, streamed": lambda: joined(chat(stream=True)) == said(chat()),
        "usage in a stream": lambda: list(chat(stream=True, stream_options={"include_usage": True}))[-1].usage,
        "image sent along": lambda: said(chat(look(DATA_URI))) == SEEN,
        "image by http: URL (s)": lambda: chat(look(IMAGE_URL), scripted=True).usage.prompt_tokens > 30,
        "image by file: URL": lambda: said(chat(look(IMAGE.as_uri()))) == SEEN,
        "clip sent along": lambda: chat(look(CLIP_URI, "video_url")).usage.prompt_tokens > 40,
        "tools offered": lambda: said(chat(tools=[TOOL])),
        "tool call (s)": lambda: city(arguments(chat(tools=[TOOL], scripted=True))),
        "two calls (s)": lambda: len(calls(chat(user("both?"), tools=[TOOL], scripted=True))) == 2,
        "call, streamed (s)": lambda: city(
            "".join(
                call.function.arguments
                for delta in deltas(chat(tools=[TOOL], scripted=True, stream=True))
                for call in delta.tool_calls or ()
            )
        ),
        "tool loop (s)": loop,
        "tool_choice: required": lambda: city(
            arguments(chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False))
        ),
        "tool_choice: by name": lambda: city(
            arguments(chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}))
        ),
        "parallel_tool_calls: false": lambda: (
            len(calls(chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False))) == 1
        ),
        "json_object": lambda: said(chat(response_format={"type": "json_object"})).lstrip().startswith("{"),
        "json_schema": lambda: (
            city(said(chat(response_format=FORMAT))) and city(joined(chat(response_format=FORMAT, stream=True)))
        ),
        "reasoning (s)": lambda: chat(user("think"), scripted=True).choices[0].message.reasoning_content == "I look.",
        "reasoning, streamed (s)": lambda: (
            joined(chat(user("think"), scripted=True, stream=True), "reasoning_content") == "I look."
        ),
        "log probabilities": logprobs,
        "n = 2": lambda: [choice.index for choice in chat(n=2, temperature=1, seed=3).choices] == [0, 1],
        "sampling options": sampling,
    }
