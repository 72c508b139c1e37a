"""A ServingEngine over a channel to the engine's process."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output, Params, check_tokens
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.serving_engine import RequestLimits, Status
from jet_export.runtime.tokenizer import ByteTokenizer, StopText, Tokenizer
from jet_export.server.ipc.channel import Channel
from jet_export.server.ipc.messages import (
    Cancel,
    Kind,
    Refused,
    Submit,
    decode_cached,
    decode_outputs,
    decode_status,
    encode_id,
)
from jet_export.utils.errors import JetExportError

IDS = 1 << 32


class EngineClient:
    """The engine at the other end of `sock`. Text and stop strings are made here; the engine only makes tokens.

    `on_drain()`: the engine's process asks this one to finish. `on_lost()`: it is gone; every request has ended with
    an error then, as any new one does.
    """

    def __init__(
        self,
        sock: socket.socket,
        tokenizer: Tokenizer | ByteTokenizer,
        limits: RequestLimits,
        vocab_size: int,
    ) -> None:
        self.tokenizer, self.limits, self.vocab_size = tokenizer, limits, vocab_size
        self.on_drain: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        self._channel = Channel(sock, self._on_frame, self._on_close)
        self._next = itertools.count()
        self._streams: dict[int, tuple[OutputStream, int]] = {}  # by request id, with the index of the prompt
        self._questions: dict[int, asyncio.Future[Status]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._channel.open()
        try:
            yield
        finally:
            self._channel.close()

    def ready(self) -> None:
        """Tell the engine's process that this one listens."""
        self._channel.send(Kind.READY, b"")

    def submit(self, prompts: Sequence[Sequence[int]], params: Params) -> OutputStream:
        """See ServingEngine; at least one prompt. Refusals of the engine come with the first batch."""
        for row in (*prompts, params.token_ids):
            check_tokens(row, self.vocab_size)
        ids = [next(self._next) % IDS for _ in prompts]
        if ids[-1] < ids[0]:  # the numbers began again
            ids = [next(self._next) % IDS for _ in prompts]

        def cancel(i: int, reason: str) -> None:
            if self._streams.pop(ids[i], None):
                self._channel.send(Kind.CANCEL, Cancel(ids[i], reason).encode())

        stream = OutputStream(len(prompts), cancel, [StopText(self.tokenizer, params.stop) for _ in prompts])
        if self._channel.closed:
            for i in range(len(prompts)):
                stream.put(i, Output(None, finish_reason="error"))
            return stream
        message = Submit(ids[0], [list(p) for p in prompts], replace(params, stop=())).encode()
        self._streams.update((ids[i], (stream, i)) for i in range(len(prompts)))
        self._channel.send(Kind.SUBMIT, message)
        return stream

    async def status(self) -> Status:
        if self._channel.closed:
            return Status(False, "")
        question = next(self._next) % IDS
        answer: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._questions[question] = answer
        self._channel.send(Kind.ASK_STATUS, encode_id(question))
        try:
            return await answer
        finally:
            del self._questions[question]

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == Kind.OUTPUTS:
            for i, output in decode_outputs(payload):
                if i in self._streams:  # not of one that was cancelled here
                    stream, index = self._streams[i] if output.finish_reason is None else self._streams.pop(i)
                    stream.put(index, output)
        elif kind == Kind.CACHED:
            for i, tokens in decode_cached(payload):
                if i in self._streams:
                    stream, index = self._streams[i]
                    stream.put_cached(index, tokens)
        elif kind == Kind.REFUSED:
            self._refuse(Refused.decode(payload))
        elif kind == Kind.STATUS:
            question, status = decode_status(payload)
            self._answer(question, status)
        elif kind == Kind.DRAIN:
            self.on_drain()
        else:
            raise ValueError(f"a message of kind {kind}")

    def _refuse(self, refused: Refused) -> None:
        if refused.first not in self._streams:  # closed meanwhile
            return
        refused_stream, _ = self._streams[refused.first]
        self._streams = {i: entry for i, entry in self._streams.items() if entry[0] is not refused_stream}
        refused_stream.fail((QueueFull if refused.queue_full else JetExportError)(refused.message))

    def _answer(self, question: int, status: Status) -> None:
        answer = self._questions.get(question)
        if answer and not answer.done():
            answer.set_result(status)

    def _on_close(self) -> None:
        streams, self._streams = self._streams, {}
        for stream, index in streams.values():
            stream.put(index, Output(None, finish_reason="error"))
        for question in list(self._questions):
            self._answer(question, Status(False, ""))
        self.on_lost()
