"""Requests of odd kinds: each has one clear 4xx, nothing is left of it, and no other request changes."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.serving import async_llm, server, wait_until

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[-1].content }}{{ messages[-1].tool_calls | tojson }}"
)
BODY = {"model": "mini", "prompt": "abc", "max_tokens": 6, "temperature": 0}
CHAT = {"model": "mini", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
JSON = {"Content-Type": "application/json"}
DEEP = '{"a":' * 900 + "1" + "}" * 900


@pytest.fixture(scope="module")
def llm():
    return async_llm()


@pytest.fixture(scope="module")
def address(llm):
    with server(llm, TEMPLATE) as address:
        yield address


def deep(n: int) -> dict:
    value: dict = {}
    for _ in range(n):
        value = {"items": value}
    return value


def tool(parameters: dict) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def called(arguments: str) -> dict:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def encoded(body: dict) -> bytes:
    return json.dumps(body).encode()


ODD = {
    "gzip": ("completions", gzip.compress(encoded(BODY)), {**JSON, "Content-Encoding": "gzip"}, 400),
    "form": ("completions", b"model=mini", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "multipart": ("completions", b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
    "no type": ("completions", encoded(BODY), {}, 415),
    "utf-16": ("completions", json.dumps(BODY).encode("utf-16"), JSON, 400),
    "two bodies": ("completions", encoded(BODY) * 2, JSON, 400),
    "a list": ("completions", b"[]", JSON, 400),
    "n = 10,000": ("completions", encoded({**BODY, "n": 10_000}), JSON, 400),
    "n = 10,000 in a chat": ("chat/completions", encoded({**CHAT, "n": 10_000, "stream": True}), JSON, 400),
    "a deep tool": ("chat/completions", encoded({**CHAT, "tools": [tool(deep(300))]}), JSON, 400),
    "a tool too deep": ("chat/completions", b'{"tools": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", JSON, 400),
    "deep arguments": ("chat/completions", encoded({**CHAT, "messages": [called(DEEP)]}), JSON, 400),
    "arguments too deep": ("chat/completions", encoded({**CHAT, "messages": [called("[" * 9000)]}), JSON, 400),
    "many tools": ("chat/completions", encoded({**CHAT, "tools": [tool({})] * 500}), JSON, 400),
}  # fmt: skip


def test_each_is_refused_and_changes_nothing(address, llm) -> None:
    def ask(path: str, content: bytes, headers: dict) -> httpx.Response:
        return httpx.post(f"{address}/v1/{path}", content=content, headers=headers, timeout=60)

    def good(i: int) -> dict:
        return ask("completions", encoded({**BODY, "prompt": "abc" * (i % 3 + 1)}), JSON).json()["choices"]

    alone = [good(i) for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        among = [pool.submit(good, i) for i in range(6)]
        for name, (path, content, headers, status) in ODD.items():
            answer = ask(path, content, headers)
            assert answer.status_code == status, (name, answer.text)
            assert answer.json()["error"]["message"] and len(answer.content) < 1000, name
        assert [f.result() for f in among] == [alone[i % 3] for i in range(6)]
    wait_until(lambda: not llm.batching.sequences)
    assert llm.batching.scheduler.slots.used == llm.batching.scheduler.memory.requests_pages == 0
