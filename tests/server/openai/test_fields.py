"""What each field of a request does: the tokens are those that the engine gives for the same Params."""

import queue

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.serving import async_llm, server

from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling

PROMPT = list(b"abc")


@pytest.fixture(scope="module")
def llm():
    return async_llm(prefix_cache_bytes=0)


@pytest.fixture(scope="module")
def address(llm):
    with server(llm) as address:
        yield address


def post(address: str, path: str = "completions", **body) -> dict:
    answer = httpx.post(f"{address}/v1/{path}", json={"model": "mini", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def completed(address: str, **changes) -> str:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **changes}
    return post(address, **body)["choices"][0]["text"]


def direct(llm, params: Params) -> str:
    """The text that the engine gives."""
    outputs: queue.Queue = queue.Queue()
    llm.batching.submit(PROMPT, params, outputs.put)
    text = ""
    while True:
        output = outputs.get(timeout=30)
        text += output.text
        if output.finish_reason is not None:
            return text


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
        ({"frequency_penalty": -1.5}, {"frequency_penalty": -1.5}),
        ({"logit_bias": {"65": 0.5, "66": -100}}, {"logit_bias": ((65, 0.5), (66, -100.0))}),
        ({"stop_token_ids": [5, 7, 9], "min_tokens": 6}, {"stop_ids": (5, 7, 9), "min_tokens": 6}),
        (
            {"temperature": 1.5, "min_p": 0.3, "seed": 3},
            {"sampling": Sampling(temperature=1.5, min_p=0.3, seed=3)},
        ),
    ],
)
def test_a_field_reaches_the_engine(address, llm, fields, params) -> None:
    assert completed(address, **fields) == direct(llm, Params(12, **params))


def test_what_the_fields_mean(address, llm) -> None:
    plain = completed(address)
    assert completed(address, logit_bias={"65": 100}) == "A" * 12
    assert completed(address, temperature=5, min_p=1) == plain  # only the most likely token is left
    assert completed(address, presence_penalty=2, frequency_penalty=2) != plain
    first = post(address, prompt=PROMPT, max_tokens=1, temperature=0)
    ends = list(range(20))  # whatever ends it early, it has six tokens
    cut = post(address, prompt=PROMPT, max_tokens=12, temperature=0, stop_token_ids=ends, min_tokens=6)
    assert first["usage"]["completion_tokens"] == 1 and cut["usage"]["completion_tokens"] >= 6


def test_fields_that_change_nothing_are_accepted(address) -> None:
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "implicit"},
    }
    assert completed(address, **ignored, best_of=1, suffix=None) == completed(address)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    neutral = {
        "modalities": ["text"],
        "tool_choice": "none",
        "function_call": "none",
        "parallel_tool_calls": True,
        "reasoning_effort": "none",
        "verbosity": "medium",
        "prediction": {"type": "content", "content": "hello"},
        "response_format": {"type": "text"},
        "stream_options": {"include_usage": False, "include_obfuscation": False},
    }
    answers = [post(address, "chat/completions", **chat, **more)["choices"] for more in ({}, {**ignored, **neutral})]
    assert answers[0] == answers[1]
