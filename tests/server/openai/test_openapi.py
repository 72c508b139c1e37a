"""/openapi.json says what is accepted."""

import json
import re

import pytest

pytest.importorskip("fastapi")

from fastapi.openapi.models import OpenAPI
from fastapi.testclient import TestClient
from helpers.scripted_engine import ScriptedEngine

from jet_export.server.openai.app import create_app
from jet_export.server.openai.options import ApiOptions
from jet_export.server.openai.protocol import ChatBody, CompletionBody
from jet_export.server.openai.tokenization import DetokenizeBody, TokenizeBody

BODIES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


@pytest.fixture(scope="module")
def client():
    return TestClient(create_app(ScriptedEngine(("x", "stop")), ApiOptions(names=("mini",), max_body_bytes=10_000)))


@pytest.fixture(scope="module")
def document(client) -> dict:
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    return answer.json()


def test_it_is_a_document_whose_references_resolve(document) -> None:
    assert OpenAPI.model_validate(document).openapi.startswith("3.1")
    found = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document)))
    assert found and found <= document["components"]["schemas"].keys()
    assert json.dumps(document).count('"$ref"') == len(
        re.findall(r'"\$ref": "#/components/schemas/', json.dumps(document))
    )


def test_every_endpoint_is_there(client, document) -> None:
    """Those that are listed answer; no other is known."""
    listed = {(method, path) for path, item in document["paths"].items() for method in item}
    assert {path for method, path in listed if method == "post"} == BODIES.keys()
    gets = {path for method, path in listed if method == "get"}
    assert gets == {"/", "/v1/models", "/v1/models/{asked}", "/tokenizer_info", "/health", "/metrics"}
    for path in gets:
        assert client.get(path.replace("{asked}", "mini")).status_code in (200, 503)


@pytest.mark.parametrize(("path", "body"), BODIES.items())
def test_every_field_is_there_and_no_other_is_accepted(client, document, path, body) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    assert schema["properties"].keys() == body.model_fields.keys() and schema["additionalProperties"] is False
    refused = client.post(path, json={"model": "mini", "frobnicate": 1})
    assert refused.status_code == 400


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_loads_scripts_from_elsewhere(client, path) -> None:
    assert client.get(path).status_code == 404
