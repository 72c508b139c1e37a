"""Hands the outputs of a step to asyncio by one wake-up of each event loop; one a token would hold the next step up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.params import Output
from jet_export.runtime.sequence import OnOutput

log = logging.getLogger(__name__)
Put = Callable[[int, Output], None]  # (index of the prompt, its output)
Letter = tuple[Put, int, Output]


class Mailbox:
    """Outputs wait here until the step that made them is over; those of other occasions, a cancellation, do not.

    All calls but `deliver` come under the engine's lock.
    """

    def __init__(self, batching: BatchingEngine) -> None:
        self.batching = batching
        self.waiting: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
        batching.after_step = self.flush

    def sender(self, loop: asyncio.AbstractEventLoop, put: Put, i: int) -> OnOutput:
        """A callback that calls put(i, output) in this loop."""

        def send(output: Output) -> None:
            if loop.is_closed():
                raise RuntimeError("its event loop is closed")  # the engine cancels the request
            self.waiting.setdefault(loop, []).append((put, i, output))
            if not self.batching.delivering:
                self.flush()

        return send

    def flush(self) -> None:
        waiting, self.waiting = self.waiting, {}
        for loop, letters in waiting.items():
            try:
                loop.call_soon_threadsafe(deliver, letters)
            except RuntimeError:  # closed meanwhile: the next output of each request cancels it
                log.warning("%d outputs were lost: their event loop is closed", len(letters))


def deliver(letters: list[Letter]) -> None:
    """In the event loop."""
    for put, i, output in letters:
        put(i, output)
