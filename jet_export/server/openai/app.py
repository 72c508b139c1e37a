"""The endpoints: /v1/completions, /v1/chat/completions, /v1/models, /tokenize and its like, /health, /metrics,
/openapi.json, and a page at /.

A client that disconnects cancels its requests. Bad requests are answered 4xx with a reason, 429 if the queue is full,
503 if a request waited too long or the server shuts down.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.serving_engine import ServingEngine
from jet_export.server.openai.api import Api
from jet_export.server.openai.chat import ChatTemplate
from jet_export.server.openai.events import ClientDisconnected
from jet_export.server.openai.middleware import wrapped
from jet_export.server.openai.openapi import accepts, describe, failures, generates
from jet_export.server.openai.options import ApiOptions
from jet_export.server.openai.page import serve_page
from jet_export.server.openai.protocol import ApiError, ChatBody, CompletionBody, refusal
from jet_export.server.openai.spans import without_spans
from jet_export.server.openai.tokenization import DetokenizeBody, Tokenization, TokenizeBody
from jet_export.utils.errors import JetExportError
from jet_export.utils.version import __version__


def create_app(
    engine: ServingEngine,
    options: ApiOptions,
    template: ChatTemplate | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> ASGIApp:
    """The application; it starts and stops the engine."""
    api = Api(engine, options, template)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with engine.running():
            yield

    quiet = without_spans(FastAPI)
    app = FastAPI(title="jet-export", lifespan=lifespan, docs_url=None, redoc_url=None, **quiet)  # they load scripts
    app.add_api_route("/v1/completions", api.completions, methods=["POST"], **generates(CompletionBody))
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], **generates(ChatBody))
    tokenization = Tokenization(api, tokenizer_config or {})
    app.add_api_route("/tokenize", tokenization.tokenize, methods=["POST"], **accepts(TokenizeBody))
    app.add_api_route("/detokenize", tokenization.detokenize, methods=["POST"], **accepts(DetokenizeBody))
    app.add_api_route("/tokenizer_info", tokenization.info, methods=["GET"])
    app.add_api_route("/", serve_page, methods=["GET"], response_class=HTMLResponse)
    _add_models(app, api)
    _add_status(app, engine)
    _add_error_handlers(app)
    describe(app, CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, version=__version__)
    return wrapped(app, options)


def _add_models(app: FastAPI, api: Api) -> None:
    created, limit = int(time.time()), api.limits.max_seq_len

    def described(name: str) -> dict[str, Any]:
        more = {"created": created, "owned_by": "jet-export", "max_model_len": limit}
        return {"id": name, "object": "model", **more, "root": api.name}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in api.names]}

    @app.get("/v1/models/{asked:path}", responses=failures(404))
    async def one_model(asked: str) -> dict[str, Any]:
        api.check_model(asked)
        return described(asked)


def _add_status(app: FastAPI, engine: ServingEngine) -> None:
    @app.get("/health")
    async def health() -> Response:
        alive = (await engine.status()).alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        text = (await engine.status()).metrics
        return PlainTextResponse(text, 200 if text else 503, media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, e: ApiError) -> Response:
        return JSONResponse(e.body(), e.status)

    @app.exception_handler(QueueFull)
    async def on_queue_full(request: Request, e: QueueFull) -> Response:
        error = ApiError(429, " ".join(str(e).splitlines()), "queue_full")
        return JSONResponse(error.body(), 429, headers={"Retry-After": "1"})

    @app.exception_handler(JetExportError)
    async def on_refusal(request: Request, e: JetExportError) -> Response:
        return await on_api_error(request, refusal(e))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, e: HTTPException) -> Response:
        return JSONResponse(ApiError(e.status_code, str(e.detail)).body(), e.status_code, headers=e.headers)

    @app.exception_handler(Exception)
    async def on_unexpected_error(request: Request, e: Exception) -> Response:  # middleware.py logs it
        return JSONResponse(ApiError(500, "The server failed on this request.").body(), 500)

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(ClientDisconnected)
    async def on_client_gone(request: Request, e: Exception) -> Response:
        return Response(status_code=499)  # never sent
