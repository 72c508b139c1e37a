"""The endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

A client that disconnects cancels its requests. Bad requests are answered 4xx with a reason, 429 if the queue is full,
503 if a request waited too long or the server shuts down.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output, Params
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.serving_engine import ServingEngine
from jet_export.server.fields import FAILURES, max_prompt_bytes
from jet_export.server.openai.answers import DONE, Answer, ChatAnswer, CompletionAnswer, event
from jet_export.server.openai.chat import ChatTemplate
from jet_export.server.openai.protocol import ApiError, ChatBody, CommonBody, CompletionBody, parse, refusal
from jet_export.utils.errors import JetExportError

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client disconnected before its answer."""


class Api:
    """The generation endpoints, over one engine. `name`: what clients call the model."""

    def __init__(
        self, engine: ServingEngine, name: str, template: ChatTemplate | None, max_body_bytes: int | None
    ) -> None:
        self.engine, self.name, self.template = engine, name, template
        self.limits = engine.limits
        self.max_body_bytes = max_body_bytes or max_prompt_bytes(self.limits.max_seq_len)

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._read(request))
        self.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo and logprobs together are not supported.")
        asked = body.prompts
        limit = self.limits.slots + self.limits.max_waiting
        if not 1 <= len(asked) <= limit:
            raise ApiError(400, f"prompt: {len(asked)} prompts; between 1 and {limit} are accepted.")
        prompts = await asyncio.to_thread(lambda: [self._ids(p) for p in asked])
        params = body.params(16 if body.max_tokens is None else body.max_tokens, body.logprobs)
        decode = self.engine.tokenizer.decode
        echo = [p if isinstance(p, str) else decode(p) for p in asked] if body.echo else None
        answer = CompletionAnswer(self.name, self.engine.tokenizer, prompts, echo)
        return await self._answer(request, body, answer, params)

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request))
        self.check_model(body.model)
        template = self.template
        if template is None:
            raise ApiError(400, f"{self.name}'s tokenizer has no chat template; use /v1/completions.")
        messages = [m.plain() for m in body.messages]
        prompt = await asyncio.to_thread(lambda: self._ids(template(messages), special_tokens=False))
        room = max(self.limits.max_seq_len - len(prompt), 1)
        limits = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.")
        params = body.params(min(limits, default=room), (body.top_logprobs or 0) if body.logprobs else None)
        answer = ChatAnswer(self.name, self.engine.tokenizer, [prompt])
        return await self._answer(request, body, answer, params)

    async def _read(self, request: Request) -> bytes:
        """The body. Raises ApiError if it is longer than allowed or not JSON by its type."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Content-Type must be application/json.")
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > self.max_body_bytes:
                raise ApiError(413, f"The body is longer than {self.max_body_bytes} bytes.")
        return bytes(raw)

    def check_model(self, asked: str) -> None:
        if asked != self.name:
            raise ApiError(404, f"Model {asked[:100]!r} is not served here; {self.name!r} is.", "model_not_found")

    def _ids(self, prompt: str | list[int], special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, str):
            return self.engine.tokenizer.encode(prompt, special_tokens)
        return prompt

    async def _answer(self, request: Request, body: CommonBody, answer: Answer, params: Params) -> Response:
        outputs = self.engine.submit(answer.prompts, params)
        try:
            if not body.stream:
                await until_disconnect(request, collect(outputs, answer))
                return JSONResponse(answer.result())
            # Before the stream begins, a failure still gets its own status.
            first = await until_disconnect(request, outputs.batch())
            raise_failure(first[0][1])
            return EventStream(first, outputs, answer, body.usage_in_stream)
        except BaseException:
            outputs.close()
            raise


async def collect(outputs: OutputStream, answer: Answer) -> None:
    while batch := await outputs.batch():
        for i, output in batch:
            raise_failure(output)
            answer.add(i, output)
    answer.cached_tokens = outputs.cached_tokens


def raise_failure(output: Output) -> None:
    if output.finish_reason in FAILURES:
        failure = FAILURES[output.finish_reason]
        raise ApiError(failure.status, failure.message, failure.code)


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises ClientDisconnected if the client disconnects first."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for t in (task, disconnected):
            t.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: one for each output, then [DONE]. A failure is the last event of its stream.

    However the response ends, its requests end too. One message of ASGI for all that arrived together.
    """

    media_type = "text/event-stream"

    def __init__(self, first: list[tuple[int, Output]], outputs: OutputStream, answer: Answer, usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.first, self.outputs, self.answer, self.usage = first, outputs, answer, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(self._close_on_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            text = "".join(event(self.answer.chunk(choice)) for choice in self.answer.opening())
            batch = self.first
            while batch:
                text += self._events(batch)
                if text:
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                text, batch = "", await self.outputs.batch()
            await send({"type": "http.response.body", "body": self._end().encode(), "more_body": False})
        except ApiError as e:
            await send({"type": "http.response.body", "body": event(e.body()).encode(), "more_body": False})
        finally:
            watch.cancel()
            self.outputs.close()

    def _events(self, batch: list[tuple[int, Output]]) -> str:
        """Raises ApiError for a request that failed."""
        parts = []
        for i, output in batch:
            raise_failure(output)
            parts.append(self.answer.event(i, output))
        return "".join(parts)

    def _end(self) -> str:
        self.answer.cached_tokens = self.outputs.cached_tokens
        return (event(self.answer.usage_chunk()) if self.usage else "") + DONE

    async def _close_on_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.outputs.close()


def create_app(
    engine: ServingEngine, name: str, template: ChatTemplate | None = None, max_body_bytes: int | None = None
) -> FastAPI:
    """The application; it starts and stops the engine. `name`: what clients call the model."""
    api = Api(engine, name, template, max_body_bytes)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with engine.running():
            yield

    app = FastAPI(title="jet-export", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/completions", api.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])

    limit = api.limits.max_seq_len
    model = {"id": name, "object": "model", "created": created, "owned_by": "jet-export", "max_model_len": limit}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        api.check_model(asked)
        return model

    @app.get("/health")
    async def health() -> Response:
        alive = (await engine.status()).alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = (await engine.status()).metrics
        return PlainTextResponse(text, 200 if text else 503, media_type="text/plain; version=0.0.4")

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
    async def on_unexpected_error(request: Request, e: Exception) -> Response:  # uvicorn logs it
        return JSONResponse(ApiError(500, "The server failed on this request.").body(), 500)

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(ClientDisconnected)
    async def on_client_gone(request: Request, e: Exception) -> Response:
        return Response(status_code=499)  # never sent

    return app
