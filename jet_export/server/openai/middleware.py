"""Around the application: request ids and the access log, spans, CORS, the API key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time

from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jet_export.server.openai.options import ApiOptions
from jet_export.server.openai.protocol import ApiError
from jet_export.server.openai.spans import Spans, tracer

log = logging.getLogger(__name__)
access = logging.getLogger("jet_export.access")
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
OPEN_PATHS = ("/", "/health")  # need no key


def wrapped(app: ASGIApp, options: ApiOptions) -> ASGIApp:
    if options.api_key:
        app = ApiKey(app, options.api_key)
    if options.origins:  # outside of the key: refusals too must be readable, and preflights have none
        app = CORSMiddleware(
            app,
            allow_origins=options.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id",),
        )
    if traced := tracer():
        app = Spans(app, traced)
    return RequestLog(app, options.access_log)


def log_access() -> None:
    """Print the lines of the access log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False


class ApiKey:
    """Answers 401, in OpenAI's format, without the key. The comparison takes the same time wherever they differ."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._expected = app, _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self._expected):
            await self.app(scope, receive, send)
            return
        if key:
            error = ApiError(401, "Incorrect API key provided.", "invalid_api_key")
        else:
            error = ApiError(401, "No API key was provided: send the header Authorization: Bearer KEY.")
        await JSONResponse(error.body(), 401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)


class RequestLog:
    """Every response has an X-Request-Id: the request's, or a new one. Failures, and all requests if `every`, are
    logged with it."""

    def __init__(self, app: ASGIApp, every: bool) -> None:
        self.app, self.every = app, every

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16).encode()
        began, status = time.monotonic(), 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        except Exception:
            log.exception("request %s failed: %s", request_id.decode(), _line(scope))
            if not status:
                raise
        finally:
            if self.every:
                client = (scope.get("client") or ("-",))[0]
                seconds = time.monotonic() - began
                access.info("%s %s %d %.3f s %s", client, _line(scope), status, seconds, request_id.decode())


def _line(scope: Scope) -> str:
    """Method and path, as they came: percent-encoded, and without the query."""
    path = scope.get("raw_path") or scope["path"].encode()
    return f"{scope['method']} {path.split(b'?')[0].decode('ascii', 'backslashreplace')}"


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
