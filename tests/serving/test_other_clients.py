"""OpenAI's client with `responses`, and Anthropic's with `messages`, unchanged, over sockets."""

from __future__ import annotations

import anthropic
import openai
import pydantic
import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, TokenEvent
from qwen3vl_disagg.core.errors import DeadlineError
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from tests.support.fake_backend import FakeBackend, answer_steps, tiny_processor
from tests.support.images import png, uri
from tests.support.running import RunningApp

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


ASK = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "what?"}]}


class Thing(pydantic.BaseModel):
    a: int


def script(prompt, sampling):
    """An object where one is asked for, a call where one may come, else text; a question of 5 tokens fails."""
    if sampling.max_new_tokens == 5:
        return [AllDecoded(), TokenEvent(40), DeadlineError("too late")]
    kind = sampling.grammar and sampling.grammar.kind
    texts = {None: "red circle", "json": '{"a": 1}', "text": "I add.\n" + CALL, "calls": CALL}
    return answer_steps(texts[kind], sampling)


@pytest.fixture(scope="module")
def url():
    app = create_app(FakeBackend(script), tiny_processor(), model_name="tiny", keys=ApiKeys(["sk-good"]))
    with RunningApp(app) as running:
        yield running.url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-good", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="sk-good", max_retries=0) as made:
        yield made


class TestResponses:
    def test_create(self, client):
        answer = client.responses.create(model="tiny", input="what?", instructions="be brief", store=True)
        assert answer.output_text == "red circle"
        type(answer).model_validate(answer.to_dict())  # what the client itself does not check
        seen = [{"type": "input_text", "text": "what?"}, {"type": "input_image", "image_url": uri(png())}]
        with_image = client.responses.create(model="tiny", input=[{"role": "user", "content": seen}])
        assert with_image.usage.input_tokens > answer.usage.input_tokens

    def test_stream(self, client):
        with client.responses.stream(model="tiny", input="what?") as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_text == "red circle"
        assert kinds[0] == "response.created"
        assert "response.output_text.delta" in kinds
        for event in client.responses.create(model="tiny", input="what?", stream=True):
            type(event).model_validate(event.to_dict())

    def test_parse(self, client):
        answer = client.responses.parse(model="tiny", input="?", text_format=Thing)
        assert answer.output_parsed == Thing(a=1)
        with client.responses.stream(model="tiny", input="?", text_format=Thing) as stream:
            assert stream.get_final_response().output_parsed == Thing(a=1)

    def test_a_tool_loop(self, client):
        tools = [{"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}]
        asked = [{"role": "user", "content": "add"}]
        with client.responses.stream(model="tiny", input=asked, tools=tools, parallel_tool_calls=False) as stream:
            [done] = [event for event in stream if event.type == "response.function_call_arguments.done"]
            answer = stream.get_final_response()
        said, call = answer.output
        assert (said.content[0].text, call.name, call.arguments, done.arguments) == (
            *("I add.", "add", '{"a": 1}', '{"a": 1}'),
        )
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        again = client.responses.create(model="tiny", input=[*asked, *answer.output, result], tools=tools)
        assert again.output_text == "red circle"

    def test_errors(self, client):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="tiny", input="?", previous_response_id="resp_1")
        assert caught.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="other", input="?")
        *_, last = client.responses.create(model="tiny", input="?", max_output_tokens=5, stream=True)
        assert last.type == "response.failed"
        type(last).model_validate(last.to_dict())


class TestMessages:
    def test_create(self, claude):
        answer = claude.messages.create(**ASK, system="be brief", extra_body={"temperature": 0.5})
        assert answer.content[0].text == "red circle"
        type(answer).model_validate(answer.to_dict())
        assert claude.messages.count_tokens(model="tiny", messages=ASK["messages"]).input_tokens > 0

    def test_stream(self, claude):
        with claude.messages.stream(**ASK) as stream:
            assert "".join(stream.text_stream) == "red circle"
            answer = stream.get_final_message()
        assert (answer.stop_reason, answer.usage.output_tokens) == ("end_turn", 3)
        for event in claude.messages.create(**ASK, stream=True):
            type(event).model_validate(event.to_dict())

    def test_a_tool_loop(self, claude):
        tools = [{"name": "add", "input_schema": SCHEMA}]
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        with claude.messages.stream(**ASK, tools=tools, tool_choice=choice) as stream:
            answer = stream.get_final_message()
        said, call = answer.content
        assert (said.text, call.name, call.input, answer.stop_reason) == ("I add.", "add", {"a": 1}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "2"}
        more = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        again = claude.messages.create(**{**ASK, "messages": [*ASK["messages"], *more]}, tools=tools)
        assert again.content[0].text == "red circle"

    def test_errors(self, claude):
        with pytest.raises(anthropic.BadRequestError) as caught:
            claude.messages.create(**ASK, extra_body={"temperature": -1})
        assert caught.value.body["error"]["type"] == "invalid_request_error"
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.create(**{**ASK, "model": "other"})
        stranger = claude.with_options(api_key="bad")
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(**ASK)
        stream = claude.messages.create(**{**ASK, "max_tokens": 5}, stream=True)
        with stream, pytest.raises(anthropic.APIStatusError, match="too late"):
            list(stream)
