"""Front ends of their own: the answers of one process, many connections, and what happens when a process ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.eager_bundle import eager_llm
from helpers.serving import LIMITS, TEMPLATE, answers, program, wait_until

from jet_export.runtime.params import Output
from jet_export.runtime.serving_engine import RequestLimits
from jet_export.server.ipc.channel import HEADER
from jet_export.server.ipc.messages import Kind, Submit, encode_outputs
from jet_export.server.openai.frontend import FrontEndConfig
from jet_export.server.openai.http import listen, raise_file_limit, url
from jet_export.server.openai.options import ApiOptions
from jet_export.server.openai.supervisor import MODULE

IDLE, BUSY = 1000, 512  # connections
ROUNDS, TOKENS = 2, 2


def body(**changes) -> dict:
    return {"model": "mini", "prompt": "abc", "max_tokens": 2, "temperature": 0, **changes}


def post(address: str, path: str = "completions", **changes) -> httpx.Response:
    """On a connection of its own, so that either front end may answer."""
    return httpx.post(f"{address}/v1/{path}", json=body(**changes), timeout=60)


def metrics(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def front_ends(process) -> list[int]:
    """Process ids."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"frontend" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(process, address) of an engine with two front ends."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    options = ("--frontends", "2", "--directory", str(directory), "--batch", str(BUSY))
    with program("0", "20", *options) as (process, address):
        yield process, address


def test_answers_are_those_of_one_process(served) -> None:
    _, address = served
    reference = eager_llm(LIMITS)
    (expected,) = reference.generate("abc", 20)
    before = metrics(address)
    for _ in range(6):
        answer = post(address, max_tokens=20).json()
        assert answer["choices"][0]["text"] == expected.text and answer["usage"]["completion_tokens"] == 20
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    stop = expected.text[8:11]
    cut = post(address, max_tokens=20, stop=stop).json()["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (expected.text[: expected.text.index(stop)], "stop")
    chat = {"model": "mini", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 9}
    message = httpx.post(f"{address}/v1/chat/completions", json=chat, timeout=60).json()["choices"][0]["message"]
    assert message["content"] == reference.generate("<user>hi\n<assistant>", 9)[0].text
    for changes, reason in (
        ({"prompt": [128]}, "token 128 is not in the vocabulary"),
        ({"prompt": "a" * 399}, "exceed max_seq_len 400"),
    ):
        for stream in (False, True):
            refused = post(address, stream=stream, **changes)
            assert refused.status_code == 400 and reason in refused.json()["error"]["message"]
    with httpx.stream("POST", f"{address}/v1/completions", json=body(max_tokens=390, stream=True)) as left:
        next(left.iter_lines())
    ended = {reason: f'jet_requests_total{{reason="{reason}"}}' for reason in ("length", "stop", "cancelled")}
    wait_until(lambda: metrics(address)[ended["cancelled"]] == before[ended["cancelled"]] + 1)
    after = metrics(address)  # of the engine, whichever front end is asked
    assert {reason: after[name] - before[name] for reason, name in ended.items()} == {
        "length": 7,
        "stop": 1,
        "cancelled": 1,
    }


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, end: bytes) -> bytes:
    """The answer, up to `end`."""
    writer.write(request)
    return await reader.readuntil(end)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def stream_of(prompt: int) -> bytes:
    content = json.dumps(body(prompt=[prompt], max_tokens=TOKENS, stream=True))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()


def test_a_thousand_idle_connections_and_512_streams_and_none_is_reset(served) -> None:
    host, port = served[1].removeprefix("http://").split(":")
    short: list[str] = []
    raise_file_limit(short.append)
    if short:
        pytest.skip(short[0])

    async def converse() -> None:
        connections = [await asyncio.open_connection(host, int(port)) for _ in range(IDLE + BUSY)]
        idle, busy = connections[:IDLE], connections[IDLE:]
        for connection in idle:
            assert b" 200 OK" in await ask(*connection, get("/v1/models"), b"]}")
        for _ in range(ROUNDS):  # bursts over connections that idle in between
            answers = (ask(*c, stream_of(i % 128), b"\r\n0\r\n\r\n") for i, c in enumerate(busy))
            for answer in await asyncio.gather(*answers):
                assert answer.count(b"data: ") == TOKENS + 1 and b"data: [DONE]" in answer
        for connection in idle:
            assert b" 200 OK" in await ask(*connection, get("/v1/models"), b"]}")
        for _, writer in connections:
            writer.close()

    asyncio.run(converse())


def test_sigterm_lets_requests_finish(served) -> None:
    process, address = served
    pids = front_ends(process)
    assert len(pids) == 2 and not any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    request = body(max_tokens=100, stream=True)
    with httpx.stream("POST", f"{address}/v1/completions", json=request, timeout=60) as last:
        lines = last.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert not any(running(pid) for pid in pids) and not answers(address)


def test_a_front_end_that_dies_is_started_again_and_its_requests_are_cancelled() -> None:
    """Then SIGTERM ends what still runs, with a reason."""
    request = body(max_tokens=390, stream=True)
    with program("0", "0", "--frontends", "1") as (process, address):
        (pid,) = front_ends(process)
        with (
            pytest.raises(httpx.TransportError),
            httpx.stream("POST", f"{address}/v1/completions", json=request, timeout=60) as answer,
        ):
            for n, _ in enumerate(answer.iter_lines()):
                if n == 0:
                    os.kill(pid, signal.SIGKILL)
        assert post(address).status_code == 200  # waits for the new one: the listener is the same
        assert front_ends(process) != [pid]
        assert metrics(address)['jet_requests_total{reason="cancelled"}'] == 1
        with httpx.stream("POST", f"{address}/v1/completions", json=request, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.terminate()
            assert "shutting down" in [line for line in lines if line][-1]
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "a front end died with status -9; its requests are cancelled" in err and "Traceback" not in err


def test_streams_of_an_engine_that_dies_end_with_an_error_and_the_front_end_exits(tmp_path) -> None:
    """A front end alone, whose engine is this test."""
    engine, channel = socket.socketpair()
    config = FrontEndConfig(
        options=ApiOptions(names=("mini",)), bundle=str(tmp_path), limits=RequestLimits(4, 4, 400), vocab_size=128
    )
    with channel, engine, listen("127.0.0.1", 0) as listener:
        fds = (channel.fileno(), listener.fileno())
        command = [sys.executable, "-m", MODULE, config.encode(), *map(str, fds)]
        process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE, text=True)
        address = url(listener)
        channel.close()
        with engine.makefile("rb") as messages:
            assert read_message(messages) == (Kind.READY, b"")
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(post, address, stream=True)
                kind, payload = read_message(messages)
                submit = Submit.decode(payload)
                assert kind == Kind.SUBMIT and submit.prompts == [list(b"abc")]
                outputs = encode_outputs([(submit.first, Output(65))])
                engine.sendall(HEADER.pack(len(outputs), Kind.OUTPUTS) + outputs)
                engine.shutdown(socket.SHUT_RDWR)
                lines = answer.result().text.split()
        assert '"text":"A"' in lines[1] and lines[-1].endswith('"code":"engine_error"}}')
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1 and "Traceback" not in err, err


def read_message(stream: BinaryIO) -> tuple[int, bytes]:
    """(kind, payload)"""
    length, kind = HEADER.unpack(stream.read(HEADER.size))
    return kind, stream.read(length)
