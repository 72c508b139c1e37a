"""Hands the outputs of a step to asyncio by one wake-up of each event loop; one a token would hold the next step up."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.params import Output
from jet_export.runtime.sequence import OnOutput

log = logging.getLogger(__name__)
Letter = tuple["asyncio.Queue[tuple[int, Output]]", tuple[int, Output]]


class Mailbox:
    """Outputs wait here until the step that made them is over; those of other occasions, a cancellation, do not.

    All calls but `deliver` come under the engine's lock.
    """

    def __init__(self, batching: BatchingEngine) -> None:
        self.batching = batching
        self.waiting: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
        batching.after_step = self.flush

    def sender(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[tuple[int, Output]], i: int) -> OnOutput:
        """A callback that puts (i, output) into a queue of this loop."""

        def put(output: Output) -> None:
            if loop.is_closed():
                raise RuntimeError("its event loop is closed")  # the engine cancels the request
            self.waiting.setdefault(loop, []).append((queue, (i, output)))
            if not self.batching.delivering:
                self.flush()

        return put

    def flush(self) -> None:
        waiting, self.waiting = self.waiting, {}
        for loop, letters in waiting.items():
            try:
                loop.call_soon_threadsafe(deliver, letters)
            except RuntimeError:  # closed meanwhile: the next output of each request cancels it
                log.warning("%d outputs were lost: their event loop is closed", len(letters))


def deliver(letters: list[Any]) -> None:
    """In the event loop."""
    for queue, item in letters:
        queue.put_nowait(item)
