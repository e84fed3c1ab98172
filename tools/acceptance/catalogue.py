"""Which clients are tried, and what is asked of them: the columns and the rows of docs/clients.md."""

from __future__ import annotations

from dataclasses import dataclass

FEATURES = (
    "quick start",
    "quick start (s)",
    "list of models",
    "one model",
    "chat",
    "chat, streamed",
    "usage in a stream",
    "image sent along",
    "image by http: URL (s)",
    "image by file: URL",
    "clip sent along",
    "tools offered",
    "tool call (s)",
    "two calls (s)",
    "call, streamed (s)",
    "tool loop (s)",
    "tool_choice: required",
    "tool_choice: by name",
    "parallel_tool_calls: false",
    "json_object",
    "json_object (s)",
    "json_schema",
    "typed answer",
    "typed answer by a tool",
    "typed answer by a tool (s)",
    "typed answer by the prompt (s)",
    "reasoning (s)",
    "reasoning, streamed (s)",
    "log probabilities",
    "n = 2",
    "sampling options",
    "fields of vLLM",
    "prefix of an answer",
    "completions",
    "responses",
    "responses, streamed",
    "responses: tools",
    "responses: typed answer",
    "messages",
    "messages, streamed",
    "messages: tools",
    "messages: typed answer",
    "token count",
    "embeddings (e)",
    "embeddings of a model that answers",
    "an error's class, code and place",
    "wrong key",
    "32 at once",
    "cancelled",
    "load, text",
    "load, images",
    "generation task",
    "multiple choice",
    "multiple choice = transformers",
    "cases of the OpenAPI document (s)",
)
"""Rows, in their order. (s): over a backend that plays a script, as the small model writes no call and no thoughts."""


@dataclass(frozen=True)
class Client:
    """A client in an environment of its own. `script`: of tools/acceptance/clients/. `packages`: what is installed, the
    first of them is the client. `variants`: the script runs with each as its argument. A node client brings the node
    that it runs on, and asks for `@latest`: else npm takes the newest that the node of the machine is new enough for.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    variants: tuple[str, ...] = ("",)
    limit_s: int = 600

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")


AI_SDK = ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai")
CLIENTS = (
    Client("openai", "openai.py", ("openai",)),
    Client("openai-2.54.0", "openai.py", ("openai==2.54.0",)),
    Client("openai-js", "openai.mjs", ("openai@latest", "zod", "node@24")),
    Client("ai", "ai.mjs", (*(f"{name}@latest" for name in AI_SDK), "zod", "node@24")),
    Client("litellm", "litellm.py", ("litellm", "mcp"), ("hosted_vllm", "openai")),
    Client("langchain-openai", "langchain_openai.py", ("langchain-openai",)),
    Client("pydantic-ai", "pydantic_ai.py", ("pydantic-ai-slim[openai]",), ("openai", "openai-chat")),
    Client("openai-agents", "openai_agents.py", ("openai-agents",), ("responses", "chat")),
    Client("instructor", "instructor.py", ("instructor",)),
    Client("llm", "llm.py", ("llm",)),
    Client("anthropic", "anthropic.py", ("anthropic",)),
    Client("guidellm", "guidellm.py", ("guidellm[vision]",)),
    Client("aiperf", "aiperf.py", ("aiperf",)),
    Client("lm-eval", "lm_eval.py", ("lm_eval[api]", "torch>=2.11,<2.14", "transformers==5.23.*")),
    Client("schemathesis", "schemathesis.py", ("schemathesis",)),
)
