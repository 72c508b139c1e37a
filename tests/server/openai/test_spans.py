"""OpenTelemetry: a span for each request, where an SDK is configured."""

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("opentelemetry.sdk")

from fastapi.testclient import TestClient
from helpers.scripted_engine import ScriptedEngine
from helpers.serving import async_llm, server, wait_until
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jet_export.server.openai.app import create_app
from jet_export.server.openai.options import ApiOptions
from jet_export.server.openai.spans import configure
from jet_export.utils.errors import JetExportError

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exported(monkeypatch) -> InMemorySpanExporter:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


def ask(exported, answer: tuple[str, str], **changes):
    app = create_app(ScriptedEngine(answer), ApiOptions(names=("mini",)))
    body = {"model": "mini", "prompt": "abc", "temperature": 0.5, "top_k": 7, "max_tokens": 9, "seed": 1, **changes}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    reply = TestClient(app, raise_server_exceptions=False).post("/v1/completions", json=body, headers=headers)
    return reply, ours(exported)


def ours(exported):
    (span,) = exported.get_finished_spans()
    return span


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_says_what_was_asked_and_what_came(exported, stream) -> None:
    _, span = ask(exported, ("hello", "length"), stream=stream, n=2, stop=["."])
    assert span.name == "text_completion mini" and span.kind is trace.SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == TRACE and f"{span.parent.span_id:016x}" == PARENT
    assert dict(span.attributes) | {"gen_ai.response.id": ""} == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "jet-export",
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "mini",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 1,
        "gen_ai.request.stop_sequences": (".",),
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.response.id": "",
        "gen_ai.response.model": "mini",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert span.status.status_code is trace.StatusCode.UNSET


def test_requests_that_fail(exported) -> None:
    reply, span = ask(exported, ("", "error"))
    assert reply.status_code == span.attributes["http.response.status_code"] == 500
    assert span.status.status_code is trace.StatusCode.ERROR
    exported.clear()
    reply, span = ask(exported, ("", "stop"), n=10_000)
    assert reply.status_code == 400 and span.attributes["error.type"] == "400"
    assert span.status.status_code is trace.StatusCode.UNSET
    exported.clear()
    reply, span = ask(exported, ("", "timeout"), stream=True)
    assert reply.status_code == 503 and span.status.status_code is trace.StatusCode.ERROR


def test_a_client_that_leaves(exported) -> None:
    with server(async_llm()) as address:
        body = {"model": "mini", "prompt": "abc", "max_tokens": 390, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        wait_until(lambda: any(s.name == "text_completion mini" for s in exported.get_finished_spans()))
    assert ours(exported).attributes["error.type"] == "client_disconnected"


def test_the_sdk_is_missing(monkeypatch) -> None:
    configure()  # nothing is asked for
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(JetExportError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set.*\n.*jet-export\[otel\]"):
        configure()
