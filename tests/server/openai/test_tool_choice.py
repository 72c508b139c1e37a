"""tool_choice required or named: a grammar keeps the answer to calls whose arguments fit, whatever the weights are."""

import json

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from helpers.eager_bundle import eager_engine  # noqa: E402
from helpers.serving import LIMITS, server, wait_until  # noqa: E402

from jet_export.runtime.async_llm import AsyncLLM  # noqa: E402
from jet_export.runtime.batching import BatchingEngine  # noqa: E402
from jet_export.runtime.capacity import Serving  # noqa: E402
from jet_export.runtime.tokenizer import ByteTokenizer  # noqa: E402

TEMPLATE = "{% if tools %}{{ tools | length }} tools {% endif %}{{ messages[-1].content }}"
CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"]}
SCHEMA = {**CITY, "additionalProperties": False, "$defs": {"city": {"enum": ["Paris", "Rome"]}}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: list[dict] = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("weather", SCHEMA), ("now", NOTHING))
]
BODY: dict = {
    "model": "mini",
    "messages": [{"role": "user", "content": "?"}],
    "tools": TOOLS,
    "max_tokens": 300,
    "seed": 1,
}


class Ascii(ByteTokenizer):
    """Newlines are newlines."""

    def pieces(self, ids: list[int]) -> list[str]:
        return [chr(i) for i in ids]


@pytest.fixture(scope="module")
def llm():
    return AsyncLLM.over(BatchingEngine(eager_engine(LIMITS), Ascii(), -1, Serving()))


@pytest.fixture(scope="module")
def chat(llm):
    with server(llm, TEMPLATE) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0).chat.completions


def fits(call) -> None:
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "now" else arguments.get("city") in ("Paris", "Rome")


def test_required(chat) -> None:
    answer = chat.create(**BODY, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    fits(call)


def test_a_named_function(chat) -> None:
    for tool in TOOLS:
        name = tool["function"]["name"]
        choice = {"type": "function", "function": {"name": name}}
        (call,) = chat.create(**BODY, tool_choice=choice).choices[0].message.tool_calls
        assert call.function.name == name
        fits(call)


def test_in_a_stream(chat) -> None:
    with chat.stream(**BODY, tool_choice="required", parallel_tool_calls=False, n=2) as stream:
        final = stream.get_final_completion()
    for choice in final.choices:
        assert choice.finish_reason == "tool_calls"
        fits(choice.message.tool_calls[0])


def test_what_is_cut_off_is_no_call(chat) -> None:
    answer = chat.create(**{**BODY, "max_tokens": 20}, tool_choice="required").choices[0]
    assert answer.finish_reason == "length" and answer.message.tool_calls is None
    assert answer.message.content.startswith("<tool_call>")


def test_a_schema_that_is_none(chat) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 7}}}]
    with pytest.raises(openai.BadRequestError, match="schema"):
        chat.create(**{**BODY, "tools": tools}, tool_choice="required")
    assert chat.create(**{**BODY, "max_tokens": 3}, tool_choice="none").choices[0].finish_reason == "length"


def test_a_client_that_leaves_ends_all_of_its_answers(chat, llm) -> None:
    """Inside the grammar."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with chat.create(**{**BODY, "tools": tools}, tool_choice="required", n=8, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: not llm.batching.sequences)
    assert llm.batching.scheduler.slots.used == 0
