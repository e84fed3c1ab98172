"""`/openapi.json` is true: schemathesis sends what it allows and what it does not, and checks every answer."""

from __future__ import annotations

import json
import os
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from starlette.types import ASGIApp

from qwen3vl_disagg.core.sampling_params import OPTIONS
from qwen3vl_disagg.core.settings import MAX_REQUEST_TIMEOUT_S
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.intake import TIMEOUT_HEADER
from qwen3vl_disagg.serving.pooling_request import MAX_INPUTS
from tests.serving.test_mutations import BODIES
from tests.support.fake_backend import ASK, PATH, FakeBackend, serve, tiny_processor
from tests.support.pooling import EachTask

MANY = pytest.mark.acceptance
UNKNOWN_HEADER = "x-schemathesis-unknown-property"
"""With two headers in the document, that is one of the cases that should not fit it."""
cheap = settings(
    max_examples=3, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)
thorough = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


def document(**options: Any) -> dict[str, Any]:
    return serve(FakeBackend(), **options).get("/openapi.json", headers={"x-api-key": "k"}).json()


NAMES = ["Org/Model"]
APP = create_app(FakeBackend(), tiny_processor(), model_name="tiny", more_names=NAMES)
PATHS = [route.path.replace("{name:path}", "{name}") for route in APP.routes]


OPERATIONS = [
    (method, path) for path, kinds in document()["paths"].items() for method in kinds if method in ("get", "post")
]


@pytest.fixture(scope="module")
def each_task(tmp_path_factory):
    return EachTask(tmp_path_factory.mktemp("models"), more_names=NAMES)


def check(case: schemathesis.Case, app: ASGIApp) -> None:
    """All of schemathesis's checks but one: a body that fits the document may have an image that is none. Times that a
    request could not keep are not asked for. The first large body, and the first grammar, wait for a child to start."""
    timeout = str(case.headers.get(TIMEOUT_HEADER, ""))
    if timeout.isdecimal() and 0 < int(timeout) <= MAX_REQUEST_TIMEOUT_S * 1000:  # others are for the server to refuse
        del case.headers[TIMEOUT_HEADER]
    excluded = [positive_data_acceptance]
    if UNKNOWN_HEADER in (case.headers or {}):  # which anybody may send, and nobody has to refuse
        excluded.append(negative_data_rejection)
    case.call_and_validate(app=app, timeout=60, excluded_checks=excluded)


@pytest.fixture(scope="module")
def schema():
    return schemathesis.openapi.from_asgi("/openapi.json", APP)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_described(method, path, schema, each_task):
    """Strategies are made here and not when tests are collected, which every worker does."""

    @cheap
    @given(schema[path][method].as_strategy())
    def each(case):
        check(case, each_task)

    each()


@pytest.mark.parametrize("path", sorted({path for path, _ in BODIES}))
def test_good_answers_are_as_described(path, schema, each_task):
    route = schema[path]["POST"]
    for body in [body for of_path, body in BODIES if of_path == path]:
        case = route.Case(body=body, media_type="application/json")
        assert case.call_and_validate(app=each_task, timeout=60).status_code == 200


if os.environ.get("Q3VL_ACCEPTANCE"):

    @MANY
    @pytest.mark.timeout(3600)
    @schemathesis.openapi.from_asgi("/openapi.json", APP).parametrize()  # collected for a minute
    @thorough
    def test_answers_are_as_described_whatever_is_sent(case, each_task):
        """Also by a model that the route is not for."""
        check(case, each_task)
        for app in each_task.apps.values():
            if app is not each_task.app_of(case.path):
                check(case, app)


def test_every_route_is_described():
    assert set(document()["paths"]) == {*PATHS} - {"/openapi.json"}


def test_bodies_name_every_option():
    schemas = document()["components"]["schemas"]
    for name, option in OPTIONS.items():
        for body, route in (
            ("ChatBody", "chat"),
            ("CompletionBody", "completion"),
            ("ResponseRequestBody", "response"),
        ):
            for spelling in option.spellings(name, route):
                assert spelling in schemas[body]["properties"]
    temperature = schemas["ChatBody"]["properties"]["temperature"]["anyOf"]
    assert temperature == [{"type": "number", "minimum": 0, "maximum": 100}, {"type": "null"}]
    assert schemas["ResponseRequestBody"]["properties"]["n"] == {"enum": [None, 1]}
    assert schemas["ChatBody"]["properties"]["seed"]["anyOf"][0]["minimum"] == -(2**63)
    assert schemas["TokenizeBody"]["properties"]["model"] == {"enum": ["tiny", None]}


@pytest.mark.parametrize(("each", "is_bound"), [("a", True), ({"text": "a"}, True), ([5], True), (5, False)])
def test_as_many_inputs_are_described_as_are_taken(each, is_bound):
    """Ids alone are one input, however many."""
    schema = document()["components"]["schemas"]["EmbeddingsBody"]["properties"]["input"]
    jsonschema.validate([each] * MAX_INPUTS, schema)
    assert jsonschema.Draft202012Validator(schema).is_valid([each] * (MAX_INPUTS + 1)) != is_bound


def test_keys_are_described_where_there_are_some():
    assert "security" not in document()
    told = document(keys=ApiKeys(["k"]))
    assert told["security"] == [{"bearer": []}, {"key": []}]
    assert told["paths"]["/health"]["get"]["security"] == []
    assert serve(FakeBackend(), keys=ApiKeys(["k"])).get("/openapi.json").status_code == 401


def test_it_is_json_of_the_form():
    told = document()
    assert told["openapi"].startswith("3.1")
    text = json.dumps(told)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in told["components"]["schemas"]
    assert serve(FakeBackend()).post(PATH, json=ASK).status_code == 200
