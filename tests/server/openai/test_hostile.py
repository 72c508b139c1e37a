"""Bad input gets 4xx with a reason and affects no other request; signals stop the program cleanly."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.serving import async_llm, program, server

from jet_export.cli import app as cli
from jet_export.cli.options import parse_bytes


@pytest.fixture(scope="module")
def llm():
    return async_llm()


@pytest.fixture(scope="module")
def address(llm):
    with server(llm) as address:
        yield address


def post(address: str, content, path: str = "completions", kind: str = "application/json") -> httpx.Response:
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    return httpx.post(f"{address}/v1/{path}", content=content, headers={"Content-Type": kind}, timeout=30)


def body(**changes) -> dict:
    return {"model": "mini", "prompt": "abc", "max_tokens": 2, "temperature": 0, **changes}


RAW = [
    (b"\xff\xfe{}", "not UTF-8"),
    (b'{"model": "mini", "prompt": "\xe9"}', "not UTF-8"),
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"null", "valid dictionary"),
    (b'{"model": "mini", "prompt": "a", "temperature": NaN}', "NaN"),
    (b'{"model": "mini", "prompt": "a", "temperature": 1e999}', "temperature inf"),
    (b'{"model": "mini", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"model": "mini", "prompt": "\\ud800"}', "prompt"),
]
FIELDS = [
    ({"prompt": ""}, "empty"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "empty"),
    ({"prompt": [128]}, "token 128 is not in the vocabulary"),
    ({"prompt": [-1]}, "token -1"),
    ({"prompt": [2**70]}, "token"),
    ({"prompt": ["ok", "h\u00e9"]}, "not in the vocabulary"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 5000}, "5000 prompts"),
    ({"prompt": "a" * 399}, "exceed max_seq_len 400"),
    ({"max_tokens": 0}, "max_new_tokens is 0"),
    ({"max_tokens": -5}, "max_new_tokens is -5"),
    ({"max_tokens": 10**30}, "exceed max_seq_len"),
    ({"max_tokens": "7"}, "max_tokens: Input should be a valid integer"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature -0.1"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop_token_ids": [1000]}, "token 1000"),
    ({"logprobs": 21}, "logprobs 21"),
    ({"logprobs": -1}, "logprobs -1"),
    ({"n": 0}, "n 0 is not between 1 and 128"),
    ({"n": 10_000}, "n 10000 is not between 1 and 128"),
    ({"n": 100, "prompt": ["a"] * 3}, "3 prompts, 100 answers to each; between 1 and 260 are accepted"),
    ({"n": 2, "best_of": 3}, "best_of 3 is not supported"),
    ({"presence_penalty": 2.1}, "presence_penalty: Input should be less than or equal to 2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"min_p": 1.1}, "min_p 1.1 is not in [0, 1]"),
    ({"min_tokens": -1}, "min_tokens -1"),
    ({"priority": 2**31}, "priority 2147483648 is not a 32-bit integer"),
    ({"min_tokens": 3}, "min_tokens 3 is not between 0 and max_tokens 2"),
    ({"min_tokens": 1, "stop_token_ids": list(range(30))}, "min_tokens with 30 stop_ids"),
    ({"logit_bias": {"x": 5}}, "logit_bias: 'x' is not a token id"),
    ({"logit_bias": {"128": 5}}, "token 128 is not in the vocabulary"),
    ({"logit_bias": {"-1": 5}}, "'-1' is not a token id"),
    ({"logit_bias": {"1": 101}}, "101.0 for token 1 is not between -100 and 100"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"suffix": "x"}, "suffix is not supported"),
    ({"echo": True, "logprobs": 21}, "logprobs 21"),
    ({"echo": True, "logprobs": 1, "prompt": []}, "prompt"),
    ({"echo": True, "max_tokens": -1}, "max_new_tokens is -1"),
]
CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
    *(
        (({name: {}}, f"{name} is not supported"))
        for name in ("functions", "audio", "web_search_options", "moderation")
    ),
    ({"tool_choice": "required"}, "required needs tools"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "has no place for them"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"response_format": {"type": "json_schema"}}, "response_format: json_schema goes with"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"messages": [{"role": "user", "content": "x" * 400}]}, "exceed max_seq_len"),
    ({"top_logprobs": 2}, "needs logprobs"),
]


def refused(answer: httpx.Response, message: str, status: int = 400) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert len(answer.content) < 2000 and "Traceback" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("changes", "message"), FIELDS)
def test_bad_fields(address, changes, message: str, stream: bool) -> None:
    refused(post(address, body(stream=stream, **changes)), message)


@pytest.mark.parametrize(("raw", "message"), RAW)
def test_bad_bodies(address, raw: bytes, message: str) -> None:
    refused(post(address, raw), message)


@pytest.mark.parametrize(("changes", "message"), CHAT)
def test_bad_chats(address, changes, message: str) -> None:
    chat = {"model": "mini", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **changes}
    refused(post(address, chat, "chat/completions"), message)


def test_other_refusals(address) -> None:
    refused(post(address, body(model="gpt-9")), "'gpt-9' is not served here", 404)
    refused(post(address, body(), kind="text/plain"), "Content-Type", 415)
    refused(post(address, body(), "embeddings"), "Not Found", 404)
    refused(httpx.get(f"{address}/v1/completions"), "Method Not Allowed", 405)


def test_a_prompt_of_10_mb(address) -> None:
    refused(post(address, body(prompt="a" * 10_000_000)), "longer than", 413)

    def endless():
        for _ in range(160):
            yield b" " * 65536

    answer = httpx.post(f"{address}/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    refused(answer, "longer than", 413)


@pytest.mark.parametrize("declared", [True, False], ids=["with its length", "chunked"])
def test_a_client_that_sends_10_mb_before_it_reads_gets_its_413(address, declared) -> None:
    """Not a connection reset: the server reads on."""
    host, port = address.removeprefix("http://").split(":")
    content = json.dumps(body(prompt="a" * 10_000_000)).encode()
    how = f"Content-Length: {len(content)}" if declared else "Transfer-Encoding: chunked"
    with socket.create_connection((host, int(port)), timeout=30) as s:
        s.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{how}\r\n\r\n".encode()
        )
        sent = content if declared else b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
        for i in range(0, len(sent), 500_000):  # slowly enough for a server to close meanwhile
            s.sendall(sent[i : i + 500_000])
            time.sleep(0.02)
        assert s.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(("options", "pause", "stays"), [({}, 6.5, True), ({"keep_alive": 1}, 2.5, False)])
def test_idle_connections_stay_open_as_long_as_asked(options, pause, stays) -> None:
    """uvicorn's own five seconds are shorter than the pauses of clients that keep their connections."""
    with server(async_llm(), **options) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        time.sleep(pause)
        try:
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200 and stays
        except ConnectionError:
            assert not stays


def test_a_client_that_disconnects_inside_its_body(address, llm, caplog) -> None:
    host, port = address.removeprefix("http://").split(":")
    for sent in (
        b"",
        b"POST",
        b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"\x16\x03\x01\x00\xff" * 50,
    ):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(sent)
    time.sleep(0.2)
    assert httpx.get(f"{address}/health").status_code == 200
    assert not [r for r in caplog.records if r.exc_info]


def test_good_requests_among_bad_ones_are_answered_correctly(address, llm) -> None:
    expected = post(address, body(max_tokens=8)).json()["choices"][0]["text"]
    for raw, _ in RAW:
        assert post(address, raw).status_code == 400
        assert post(address, body(max_tokens=8)).json()["choices"][0]["text"] == expected
    assert llm.batching.scheduler.slots.used == 0


def test_killed_and_started_again_then_told_to_stop() -> None:
    """Killed while it answers, it starts again on the same port; SIGTERM lets requests finish, and it exits 0."""
    with program("0", "20") as (process, address):
        url = f"{address}/v1/completions"
        with httpx.stream("POST", url, json=body(max_tokens=390, stream=True)) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.kill()
            process.communicate(timeout=20)
            with pytest.raises(httpx.TransportError):
                list(lines)
    with program(address.rsplit(":", 1)[1], "20") as (process, again):
        assert again == address
        finishes_after_sigterm(process, address)


def finishes_after_sigterm(process: subprocess.Popen, address: str) -> None:
    url = f"{address}/v1/completions"
    with httpx.stream("POST", url, json=body(max_tokens=200, stream=True), timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(lines)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/health")


def test_sigterm_cancels_slow_requests_with_a_reason() -> None:
    with program("0", "0") as (process, address):
        url = f"{address}/v1/completions"
        with (
            ThreadPoolExecutor(1) as pool,
            httpx.stream("POST", url, json=body(max_tokens=390, stream=True), timeout=30) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            whole = pool.submit(post, address, body(max_tokens=390, prompt=["a"] * 8))
            while "jet_requests_waiting 5" not in httpx.get(f"{address}/metrics").text:  # 9 less 4 slots
                assert not whole.done()
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert "shutting down" in [line for line in lines if line][-1]
            refused(whole.result(), "shutting down", 503)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert "Traceback" not in err


def run_cli(monkeypatch, capsys, *args: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["jet-export", "serve", *args])
    with pytest.raises(SystemExit) as e:
        cli.main()
    captured = capsys.readouterr()
    return int(e.value.code or 0), captured.out + captured.err


def test_command_line(monkeypatch, capsys, tmp_path) -> None:
    status, out = run_cli(monkeypatch, capsys, "--help")
    assert status == 0 and "Example: jet-export serve" in out
    for args, message in (
        ((str(tmp_path),), "not a bundle"),
        ((str(tmp_path), "--openai", "--triton-repo", "x"), "exclude each other"),
        ((str(tmp_path), "--openai", "--port", "0"), "not a bundle"),
        ((str(tmp_path), "--openai", "--port", "99999"), "--port 99999"),
        ((str(tmp_path), "--openai", "--frontends", "-1"), "--frontends -1: not between 0 and 64"),
        ((str(tmp_path), "--openai", "--prefix-cache-bytes", "4GB"), "--prefix-cache-bytes 4GB: not a size"),
        ((str(tmp_path), "--openai", "--chat-template", "none.jinja"), "--chat-template none.jinja: "),
        ((str(tmp_path), "--openai", "--generation-config", "x"), "--generation-config x: neither auto nor none"),
        ((str(tmp_path), "--openai", "--api-key", "\n"), "--api-key: not a key"),
        ((str(tmp_path), "--openai", "--ssl-certfile", "none.pem"), "go together"),
        ((str(tmp_path), "--openai", "--ssl-certfile", "none.pem", "--ssl-keyfile", "k"), "--ssl-certfile none.pem"),
        ((str(tmp_path), "--openai", "--prefix-cache-bytes", "-1"), "--prefix-cache-bytes -1: not a size"),
    ):
        status, out = run_cli(monkeypatch, capsys, *args)
        assert status == 2 and message in out and "Traceback" not in out
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, out = run_cli(monkeypatch, capsys, str(tmp_path), "--openai")
    assert status == 2 and "pip install 'jet-export[serve]'" in out


def test_sizes() -> None:
    assert [parse_bytes(t, "x") for t in ("0", "123", "2K", "3m", "4G")] == [0, 123, 2048, 3 << 20, 4 << 30]


def test_importing_jet_export_needs_no_server() -> None:
    code = "import sys, jet_export, jet_export.cli; sys.exit(any(m in sys.modules for m in ('fastapi', 'uvicorn')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
