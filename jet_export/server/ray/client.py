"""A ServingEngine over the replicas: routes each call, retries what has sent nothing, ends the rest with an error."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from jet_export.model.cache import PAGE
from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output, Params, check_tokens
from jet_export.runtime.prefix import page_hashes
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.serving_engine import RequestLimits, Status
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer
from jet_export.server.ray.call import Call, Outputs, Refusal
from jet_export.utils.errors import JetExportError

log = logging.getLogger(__name__)
TRIES = 4  # replicas that a call is sent to, as long as none has answered
PAUSE = 0.2  # seconds before the second try, twice as long before each further one


class ReplicaLost(Exception):
    """The replica died, or cannot be reached."""


class Overloaded(Exception):
    """No replica takes another call."""


class Answer(Protocol):
    """What a replica answers to a call; raises ReplicaLost and Overloaded."""

    def __aiter__(self) -> AsyncIterator[Outputs | Refusal]: ...

    def cancel(self) -> None:
        """End the call in the replica."""


class FleetEngine:
    """`send(call)`: sends a call to the replica that the router chooses. `status`: of all replicas."""

    def __init__(
        self,
        send: Callable[[Call], Answer],
        tokenizer: Tokenizer | ByteTokenizer,
        limits: RequestLimits,
        vocab_size: int,
        read_status: Callable[[], Awaitable[Status]],
    ) -> None:
        self.send, self.tokenizer, self.limits, self.vocab_size = send, tokenizer, limits, vocab_size
        self.read_status = read_status
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def status(self) -> Status:
        return await self.read_status()

    def submit(self, prompts: Sequence[Sequence[int]], params: Params) -> OutputStream:
        """See ServingEngine; at least one prompt. Refusals come with the first batch."""
        for row in (*prompts, params.token_ids):
            check_tokens(row, self.vocab_size)
        once = [list(p) for p in prompts[:: params.n]]
        call = Call(number=next(self._numbers), prompts=once, params=params, prefixes=page_hashes(once[0], PAGE))
        left = set(range(len(prompts)))

        def cancel(i: int, reason: str) -> None:
            left.discard(i)
            if not left:
                task.cancel()

        stream = OutputStream(len(prompts), cancel, None)
        task = asyncio.get_running_loop().create_task(self._serve(call, stream, left))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _serve(self, call: Call, stream: OutputStream, left: set[int]) -> None:
        """`left`: the prompts that have not ended."""
        for tried in range(TRIES):
            if tried:
                await asyncio.sleep(PAUSE * 2 ** (tried - 1))
            answer, sent = self.send(call), False
            try:
                async for part in answer:
                    if isinstance(part, Refusal):
                        stream.fail((QueueFull if part.queue_full else JetExportError)(part.message))
                        return
                    sent = True
                    self._put(part, stream, left)
                break
            except asyncio.CancelledError:
                answer.cancel()
                raise
            except Overloaded:
                stream.fail(QueueFull("Every engine has as many requests as it takes.", "Try again later."))
                return
            except ReplicaLost as e:
                log.warning("a replica was lost (%s)%s", e, "" if sent else "; its requests go to another")
                if sent:
                    break
            except Exception:
                log.exception("a call failed")
                break
        for i in sorted(left):
            stream.put(i, Output(None, finish_reason="error"))

    @staticmethod
    def _put(part: Outputs, stream: OutputStream, left: set[int]) -> None:
        for i, output in part.outputs:
            stream.put_cached(i, part.cached[i])
            if output.finish_reason is not None:
                left.discard(i)
            stream.put(i, output)
