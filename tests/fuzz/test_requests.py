"""Requests with anything in them, over HTTP and to Triton's model: answered, or refused 4xx with a reason. Clients that
send slowly, stop in the middle or never read leave nothing behind; other requests' answers do not change."""

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.fuzzing import HOSTILE, damaged, fuzz, mutated
from helpers.serving import async_llm, server, wait_until
from hypothesis import example, given
from hypothesis import strategies as st

from jet_export.bundle.limits import Limits
from jet_export.server.triton.request import parse_request
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=96, prefill_chunk=32)
GOOD = {"model": "mini", "prompt": "abcdef", "max_tokens": 8, "temperature": 0}
COMPLETION = {
    **GOOD,
    "max_tokens": 2,
    "n": 1,
    "stream": False,
    "top_p": 0.9,
    "top_k": 5,
    "seed": 1,
    "stop": ["x"],
    "stop_token_ids": [3],
    "logit_bias": {"7": 1.0},
    "logprobs": 1,
    "echo": False,
    "min_tokens": 0,
    "presence_penalty": 0.1,
    "response_format": {"type": "text"},
    "stream_options": None,
}
CHAT = {
    "model": "mini",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant", "content": "y"}],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_logprobs": 1,
    "logprobs": True,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
}
TENSORS = {
    "text_input": "a",
    "max_tokens": 3,
    "stop_words": ["b"],
    "seed": 4,
    "sampling_parameters": '{"temperature": 0.5}',
    "logit_bias": {"1": 2},
    "guided_decoding_guide_type": "regex",
    "guided_decoding_guide": "a+",
}


@pytest.fixture(scope="module")
def llm():
    return async_llm(LIMITS)


@pytest.fixture(scope="module")
def address(llm):
    with server(llm) as address:
        yield address


@pytest.fixture(autouse=True)
def nothing_changes(llm, address: str):
    """The same answer before and after, and no sequence, slot or page left behind."""
    before = _answer(address)
    yield
    scheduler = llm.batching.scheduler
    wait_until(lambda: not (scheduler.running or scheduler.waiting or scheduler.slots.used))
    assert _answer(address) == before


def _answer(address: str) -> str:
    answer = httpx.post(f"{address}/v1/completions", json=GOOD, timeout=30)
    assert answer.status_code == 200
    return answer.json()["choices"][0]["text"]


@pytest.mark.parametrize(("path", "body"), [("completions", COMPLETION), ("chat/completions", CHAT)])
def test_bodies(address: str, path: str, body: dict[str, Any]) -> None:
    with httpx.Client(base_url=address, headers={"Content-Type": "application/json"}, timeout=30) as client:

        @given(mutated(body) | damaged(json.dumps(body).encode()))
        @example({**body, "seed": 2**70})
        @fuzz(60)
        def look(content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            answer = client.post(f"/v1/{path}", content=data)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.status_code, answer.text)
            assert "Traceback" not in answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]

        look()


def test_clients_that_send_anything_and_vanish(address: str) -> None:
    """Half a request, a damaged one, one whose answer is never read: the next client is served."""
    host, port = urlsplit(address).hostname, urlsplit(address).port
    content = json.dumps({**GOOD, "stream": True, "max_tokens": 60}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    whole = head.encode() + b"\r\n\r\n" + content

    @given(damaged(whole) | st.just(whole), st.integers(1, 4), st.booleans())
    @fuzz(40)
    def look(data: bytes, pieces: int, reset: bool) -> None:
        with socket.create_connection((host, port), timeout=10) as s:
            if reset:  # a close that the server sees as a reset
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            size = -(-len(data) // pieces) or 1
            for at in range(0, len(data), size):
                try:
                    s.sendall(data[at : at + size])
                except OSError:  # the server has refused, and closed
                    break

    look()


@given(mutated(TENSORS), st.sampled_from(["", "{}", '{"top_k": 3}', "[", '{"seed": 1e999}', "null", '{"n": 2}']))
@example({"text_input": "a", "logit_bias": {"1" * 5000: 1}}, "")
@example({"text_input": "a", "stop_words": 3}, "")  # TypeError: not iterable
@fuzz(150)
def test_tritons_fields(tensors: Any, parameters: str) -> None:
    if not isinstance(tensors, dict):
        return
    try:
        _ = parse_request(tensors, parameters).params
    except JetExportError as e:
        assert 5 < len(str(e)) < 3000, str(e)[:300]


@given(st.dictionaries(st.sampled_from(sorted(TENSORS)), st.sampled_from(HOSTILE)))
@fuzz(100)
def test_tritons_tensors(tensors: dict[str, Any]) -> None:
    try:
        _ = parse_request(tensors).params
    except JetExportError as e:
        assert 5 < len(str(e)) < 3000, str(e)[:300]
