"""The outputs of a request as its HTTP response: collected into one, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output
from jet_export.server.fields import FAILURES
from jet_export.server.openai.answers import DONE, Answer, event
from jet_export.server.openai.protocol import ApiError
from jet_export.server.openai.spans import Ended

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client disconnected before its answer."""


async def collect(outputs: OutputStream, answer: Answer) -> None:
    while batch := await outputs.batch():
        for i, output in batch:
            raise_failure(output)
            answer.add(i, output)
            if output.finish_reason is not None:
                answer.reasons[i] = output.finish_reason
    answer.ended(outputs)


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

    def __init__(
        self, first: list[tuple[int, Output]], outputs: OutputStream, answer: Answer, usage: bool, ended: Ended
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.first, self.outputs, self.answer, self.usage = first, outputs, answer, usage
        self.ended = ended
        self.error: str | None = "client_disconnected"  # until it has ended

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
            if len(self.answer.reasons) == len(self.answer.prompts):
                self.error = None
        except ApiError as e:
            self.error = e.code
            await send({"type": "http.response.body", "body": event(e.body()).encode(), "more_body": False})
        finally:
            watch.cancel()
            self.outputs.close()
            self.ended(self.error)

    def _events(self, batch: list[tuple[int, Output]]) -> str:
        """Raises ApiError for a request that failed."""
        parts = []
        for i, output in batch:
            raise_failure(output)
            parts.append(self.answer.event(i, output))
            if output.finish_reason is not None:
                self.answer.reasons[i] = output.finish_reason
        return "".join(parts)

    def _end(self) -> str:
        self.answer.ended(self.outputs)
        return (event(self.answer.usage_chunk()) if self.usage else "") + DONE

    async def _close_on_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.outputs.close()
