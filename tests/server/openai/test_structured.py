"""Structured output through the openai client, and what of it is refused."""

import json

import pytest

pytest.importorskip("fastapi")

pytest.importorskip("openai")
pytest.importorskip("llguidance")

import openai
from helpers.serving import async_llm, server, wait_until

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Alan"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
MESSAGES = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def llm():
    return async_llm()


@pytest.fixture(scope="module")
def client(llm):
    with server(llm) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def person(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "age"} and value["name"] in ("Ada", "Alan") and 0 <= value["age"] <= 99


def test_response_format(client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(
        model="mini", messages=MESSAGES, response_format=form, n=3, temperature=1.5, seed=1, max_tokens=60
    )
    assert all(c.finish_reason == "stop" and person(c.message.content) for c in answer.choices)
    assert len({c.message.content for c in answer.choices}) > 1
    tokens = sum(len(c.message.content) for c in answer.choices)  # of a byte each: none is made for the end
    assert answer.usage.completion_tokens == tokens
    events = list(
        client.chat.completions.create(
            model="mini", messages=MESSAGES, response_format=form, stream=True, temperature=1.5, seed=1, max_tokens=60
        )
    )
    assert "".join(e.choices[0].delta.content or "" for e in events) == answer.choices[0].message.content
    assert [e.choices[0].finish_reason for e in events if e.choices[0].finish_reason] == ["stop"]
    any_object = {"type": "json_object"}
    answer = client.chat.completions.create(model="mini", messages=MESSAGES, response_format=any_object, seed=1)
    assert answer.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({"structured_outputs": {"json": PERSON}}, person),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no").__contains__),
        ({"structured_outputs": {"regex": "[ab]{5}"}}, lambda text: len(text) == 5),
        ({"structured_outputs": {"grammar": 'start: "x" | "yy"'}}, ("x", "yy").__contains__),
        ({"guided_json": json.dumps(PERSON)}, person),
        ({"guided_choice": ["yes", "no"]}, ("yes", "no").__contains__),
        ({"guided_regex": "[ab]{5}"}, lambda text: len(text) == 5),
        ({"guided_grammar": 'root ::= "x" | "yy"'}, ("x", "yy").__contains__),
        ({"json_schema": json.dumps(PERSON)}, person),
        ({"regex": "[ab]{5}"}, lambda text: len(text) == 5),
        ({"ebnf": 'root ::= "x" | "yy"'}, ("x", "yy").__contains__),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": PERSON}}}, person),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_of_other_servers(client, fields, right) -> None:
    answer = client.completions.create(model="mini", prompt="a", max_tokens=60, seed=3, extra_body=fields)
    assert right(answer.choices[0].text) and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "("}, "unclosed group"),
        ({"guided_json": {"type": "foo"}}, "The JSON schema cannot be used: Invalid type: foo."),
        ({"guided_json": "{"}, "The JSON schema is no JSON"),
        ({"guided_choice": []}, "choice: 0 texts"),
        ({"guided_regex": "a", "structured_outputs": {"json_object": True}}, "an answer follows one of them"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag is not supported"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "json_schema goes with"),
        ({"guided_json": {"description": "x" * 1_048_570}}, "longer than 1048576 bytes"),
        ({"guided_regex": "a", "max_tokens": 500}, "exceed max_seq_len"),
    ],
)
def test_refusals(client, llm, fields, message: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="mini", prompt="a", stream=stream, extra_body=fields)
    assert message in str(refusal.value)
    assert not llm.batching.sequences


def test_a_client_that_goes_inside_a_grammar_cancels_its_request(client, llm) -> None:
    cancelled = llm.batching.metrics.requests["cancelled"]
    with client.completions.create(
        model="mini", prompt="a", max_tokens=390, stream=True, extra_body={"regex": "[ab]*", "ignore_eos": True}
    ) as events:
        next(iter(events))
    assert client.completions.create(model="mini", prompt="a", max_tokens=60, extra_body={"regex": "a{3}"}).choices
    wait_until(lambda: llm.batching.metrics.requests["cancelled"] == cancelled + 1)
    assert not llm.batching.sequences
