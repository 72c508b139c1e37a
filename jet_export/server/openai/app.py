"""The endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

A client that disconnects cancels its requests. Bad requests are answered 4xx with a reason, 429 if the queue is full,
503 if a request waited too long or the server shuts down.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.params import Output, Params
from jet_export.runtime.scheduler import QueueFull
from jet_export.server.fields import FAILURES, max_prompt_bytes
from jet_export.server.openai.answers import Answer, ChatAnswer, CompletionAnswer
from jet_export.server.openai.chat import ChatTemplate
from jet_export.server.openai.protocol import ApiError, ChatBody, CommonBody, CompletionBody, parse, refusal
from jet_export.utils.errors import JetExportError

Outputs = AsyncGenerator[tuple[int, Output], None]
T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client disconnected before its answer."""


class Api:
    """The generation endpoints, over one engine. `name`: what clients call the model."""

    def __init__(self, llm: AsyncLLM, name: str, template: ChatTemplate | None, max_body_bytes: int | None) -> None:
        self.llm, self.name, self.template = llm, name, template
        self.capacity = llm.batching.scheduler.capacity
        self.max_body_bytes = max_body_bytes or max_prompt_bytes(self.capacity.max_seq_len)

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._read(request))
        self.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo and logprobs together are not supported.")
        asked = body.prompts
        limit = self.capacity.slots + self.capacity.max_waiting
        if not 1 <= len(asked) <= limit:
            raise ApiError(400, f"prompt: {len(asked)} prompts; between 1 and {limit} are accepted.")
        prompts = await asyncio.to_thread(lambda: [self._ids(p) for p in asked])
        params = body.params(16 if body.max_tokens is None else body.max_tokens, body.logprobs)
        decode = self.llm.batching.tokenizer.decode
        echo = [p if isinstance(p, str) else decode(p) for p in asked] if body.echo else None
        answer = CompletionAnswer(self.name, self.llm.batching.tokenizer, prompts, echo)
        return await self._answer(request, body, answer, params)

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request))
        self.check_model(body.model)
        template = self.template
        if template is None:
            raise ApiError(400, f"{self.name}'s tokenizer has no chat template; use /v1/completions.")
        messages = [m.plain() for m in body.messages]
        prompt = await asyncio.to_thread(lambda: self._ids(template(messages), special_tokens=False))
        room = max(self.capacity.max_seq_len - len(prompt), 1)
        limits = [n for n in (body.max_completion_tokens, body.max_tokens) if n is not None]
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.")
        params = body.params(min(limits, default=room), (body.top_logprobs or 0) if body.logprobs else None)
        answer = ChatAnswer(self.name, self.llm.batching.tokenizer, [prompt])
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
            return self.llm.batching.tokenizer.encode(prompt, special_tokens)
        return prompt

    async def _answer(self, request: Request, body: CommonBody, answer: Answer, params: Params) -> Response:
        outputs = self.llm.stream(answer.prompts, params)
        if not body.stream:
            await until_disconnect(request, collect(outputs, answer))
            return JSONResponse(answer.result())
        try:  # before the stream begins, a failure still gets its own status
            first = await until_disconnect(request, anext(outputs))
            raise_failure(first[1])
        except BaseException:
            await outputs.aclose()
            raise
        return EventStream(events(first, outputs, answer, body.usage_in_stream), outputs)


async def collect(outputs: Outputs, answer: Answer) -> None:
    try:
        async for i, output in outputs:
            raise_failure(output)
            answer.add(i, output)
    finally:
        await outputs.aclose()


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


async def events(first: tuple[int, Output], outputs: Outputs, answer: Answer, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a chunk per output, then [DONE]. A failure is the last event of its stream."""
    for choice in answer.opening():
        yield event(answer.chunk(choice))
    try:
        async for i, output in chained(first, outputs):
            raise_failure(output)
            answer.add(i, output)
            if output.text or output.finish_reason or output.logprob:
                yield event(answer.chunk(answer.delta(i, output)))
    except ApiError as e:
        yield event(e.body())
        return
    if usage:
        yield event(answer.usage_chunk())
    yield "data: [DONE]\n\n"


async def chained(first: tuple[int, Output], rest: Outputs) -> AsyncIterator[tuple[int, Output]]:
    yield first
    async for item in rest:
        yield item


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Closes `outputs` however the response ends, which cancels its requests."""

    def __init__(self, content: AsyncIterator[str], outputs: Outputs) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.outputs.aclose()


def create_app(
    llm: AsyncLLM, name: str, template: ChatTemplate | None = None, max_body_bytes: int | None = None
) -> FastAPI:
    """The application; it starts and stops the engine. `name`: what clients call the model."""
    api = Api(llm, name, template, max_body_bytes)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        llm.start()
        yield
        await asyncio.to_thread(llm.stop)

    app = FastAPI(title="jet-export", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/completions", api.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])

    limit = api.capacity.max_seq_len
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
        alive = llm.batching.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(llm.batching.render_metrics(), media_type="text/plain; version=0.0.4")

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
