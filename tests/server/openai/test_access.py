"""Who may call the API and from where, under which names, and what is logged of it."""

import asyncio
import json
import logging
import os
import shutil
import ssl
import subprocess

import httpx
import pytest

pytest.importorskip("fastapi")

from helpers.serving import async_llm, server

from jet_export.runtime.serving_engine import RequestLimits
from jet_export.server.openai.frontend import FrontEndConfig
from jet_export.server.openai.http import Tls
from jet_export.server.openai.middleware import access, wrapped
from jet_export.server.openai.options import API_KEY, ApiOptions
from jet_export.server.openai.supervisor import FrontEnds
from jet_export.utils.errors import JetExportError

KEY = "sk-secret"
PAGE = "https://page.example"
BODY = {"model": "mini", "prompt": "abc", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def address():
    names = ("mini", "org/other")
    with server(async_llm(), names=names, api_key=KEY, origins=(PAGE,), access_log=True) as address:
        yield address


def post(address: str, key: str | None = KEY, headers: dict | None = None, **changes) -> httpx.Response:
    sent = {**(headers or {}), **({} if key is None else {"Authorization": f"Bearer {key}"})}
    return httpx.post(f"{address}/v1/completions", json={**BODY, **changes}, headers=sent, timeout=60)


def test_a_key_is_asked_for_except_by_health(address) -> None:
    assert post(address).status_code == 200
    assert httpx.get(f"{address}/health").status_code == 200
    for key, code in ((None, None), ("sk-secre", "invalid_api_key"), (KEY + "x", "invalid_api_key")):
        refused = post(address, key)
        error = refused.json()["error"]
        assert (refused.status_code, error["type"], error["code"]) == (401, "invalid_request_error", code)
        assert KEY not in refused.text and refused.headers["WWW-Authenticate"] == "Bearer"
    for path in ("v1/models", "metrics", "tokenizer_info", "nothing"):
        assert httpx.get(f"{address}/{path}").status_code == 401
    basic = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Basic {KEY}"})
    assert basic.status_code == 401


def test_the_model_has_several_names_and_answers_carry_the_first(address) -> None:
    assert {post(address, model=name).json()["model"] for name in ("mini", "org/other")} == {"mini"}
    assert post(address, model="third").status_code == 404
    listed = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert [m["id"] for m in listed["data"]] == ["mini", "org/other"]


def test_request_ids_and_the_access_log(address, caplog) -> None:
    with caplog.at_level(logging.INFO, access.name):
        assert post(address, headers={"X-Request-Id": "mine-1"}).headers.get_list("X-Request-Id") == ["mine-1"]
        made = [post(address, key).headers["X-Request-Id"] for key in (KEY, "wrong")]
        assert len(set(made)) == 2 and len(made[0]) == 32
        odd = post(address, headers={"X-Request-Id": "x" * 129}).headers["X-Request-Id"]
        assert len(odd) == 32
        httpx.get(f"{address}/health%0aforged?key={KEY}")
    lines = [r.getMessage() for r in caplog.records if r.name == access.name]
    assert lines[0].startswith("127.0.0.1 POST /v1/completions 200 ") and lines[0].endswith(" s mine-1")
    assert " 401 " in lines[2] and lines[2].endswith(made[1])
    assert "GET /health%0aforged 401" in lines[4] and KEY not in lines[4]


def test_a_failure_is_logged_with_its_request_id(caplog) -> None:
    async def broken(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        raise RuntimeError("broken")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(wrapped(broken, ApiOptions(names=("x",))))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/v1/models", headers={"X-Request-Id": "r7"})

    assert asyncio.run(ask()).headers["X-Request-Id"] == "r7"
    (record,) = [r for r in caplog.records if r.exc_info]
    assert record.getMessage() == "request r7 failed: GET /v1/models"


def test_pages_of_an_origin_may_call_the_api_and_read_refusals(address) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = httpx.options(f"{address}/v1/completions", headers=asked)
    assert preflight.status_code == 200 and preflight.headers["Access-Control-Allow-Origin"] == PAGE
    for key in (KEY, "wrong"):
        answer = post(address, key, {"Origin": PAGE})
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    assert "Access-Control-Allow-Origin" not in post(address, headers={"Origin": "https://other.example"}).headers


def test_a_key_is_not_on_the_command_line_of_a_front_end(monkeypatch) -> None:
    options = ApiOptions(names=("a", "b"), api_key=KEY, origins=("*",), chat_template="t.jinja")
    config = FrontEndConfig(options=options, bundle="x", limits=RequestLimits(1, 2, 3), vocab_size=4)
    text = config.encode()
    assert KEY not in text and json.loads(text)
    monkeypatch.setenv(API_KEY, KEY)
    assert FrontEndConfig.decode(text) == config


@pytest.mark.parametrize("key", [KEY, None])
def test_a_front_end_has_the_key_in_its_environment(monkeypatch, key) -> None:
    monkeypatch.setenv(API_KEY, "another")
    options = ApiOptions(names=("a",), api_key=key)
    config = FrontEndConfig(options=options, bundle="x", limits=RequestLimits(1, 2, 3), vocab_size=4)
    assert FrontEnds(async_llm().batching, [], config).environment().get(API_KEY) == key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls(tmp_path) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "1"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, *subject], check=True, capture_output=True, env={**os.environ})
    with server(async_llm(), tls=Tls(certfile=cert, keyfile=key)) as address:
        assert address.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=cert)
        assert httpx.get(f"{address}/health", verify=trusting).json() == {"status": "ok"}
    with pytest.raises(JetExportError, match="without a password"):
        Tls(certfile=key, keyfile=cert)
