"""OpenTelemetry: a span for each request that generates text, in the trace that its traceparent names.

Only where an SDK is configured: by opentelemetry-instrument, or here if OTEL_EXPORTER_OTLP_ENDPOINT is set. Attributes
are those of the semantic conventions for generative AI; texts are in none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jet_export.runtime.params import Params
from jet_export.server.openai.answers import Answer
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
PROVIDER = "jet-export"
_SPAN = "jet_export.span"  # in the ASGI scope
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

Ended = Callable[[str | None], None]  # the answer is complete, or failed with this code


def configure() -> None:
    """Export over OTLP where OpenTelemetry's environment variables ask for it, which say the rest too. Once a process.

    Raises JetExportError if the SDK is not installed."""
    asked = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if asked is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or tracer() is not None:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise JetExportError(f"{asked} is set, and {e.name} is missing.", "pip install 'jet-export[otel]'") from None
    os.environ.setdefault("OTEL_SERVICE_NAME", PROVIDER)
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def tracer() -> Tracer | None:
    """None without a configured SDK."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return provider.get_tracer(PROVIDER)


class Spans:
    """Around the application."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in OPERATIONS:
            await self.app(scope, receive, send)
            return
        from opentelemetry import propagate, trace

        context = propagate.extract({k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]})
        operation = OPERATIONS[scope["path"]]
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "http.route": scope["path"],
        }
        span = self.tracer.start_span(operation, context, trace.SpanKind.SERVER, attributes)

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 400:
                    _failed(span, str(message["status"]))
            await send(message)

        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            await self.app({**scope, _SPAN: span}, receive, seen)


def without_spans(framework: type) -> dict[str, Any]:
    """Arguments with which newer versions of FastAPI make no spans of their own, four for each request."""
    return {"telemetry": {"tracing": False}} if "telemetry" in signature(framework).parameters else {}


def generating(scope: Scope, answer: Answer, params: Params, limit: int | None) -> Ended:
    """The request is submitted. `limit`: max_tokens, if it was asked for. Call the result at the end."""
    span = scope.get(_SPAN)
    if span is None or not span.is_recording():
        return _nothing
    span.update_name(f"{OPERATIONS[scope['path']]} {answer.model}")
    span.set_attributes(_request(answer, params, limit))

    def ended(error: str | None) -> None:
        span.set_attributes(
            {
                "gen_ai.response.id": answer.id,
                "gen_ai.response.model": answer.model,
                "gen_ai.response.finish_reasons": [answer.reasons.get(i, "error") for i in range(len(answer.prompts))],
                "gen_ai.usage.input_tokens": answer.usage()["prompt_tokens"],
                "gen_ai.usage.output_tokens": answer.generated,
                "gen_ai.usage.cache_read.input_tokens": answer.cached_tokens,
            }
        )
        if error is not None:
            _failed(span, error)

    return ended


def _nothing(error: str | None) -> None:
    pass


def _request(answer: Answer, params: Params, limit: int | None) -> dict[str, Any]:
    s = params.sampling
    values = {
        "model": answer.model,
        "max_tokens": limit,
        "choice.count": params.n if params.n > 1 else None,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k or None,
        "seed": s.seed,
        "stop_sequences": params.stop or None,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
    }
    return {f"gen_ai.request.{name}": value for name, value in values.items() if value is not None}


def _failed(span: Span, error: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", error)
    if not error.startswith("4"):  # the server's fault
        span.set_status(StatusCode.ERROR)
