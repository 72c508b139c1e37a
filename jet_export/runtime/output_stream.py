"""The outputs of one call as the caller's asyncio task reads them. Text and stop strings are made here, in its event
loop, so that the thread that takes the steps does not wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from jet_export.runtime.params import Output
from jet_export.runtime.tokenizer import StopText


class OutputStream:
    """Outputs of several prompts, by the index of the prompt; everything is called in one event loop.

    `cancel(i, reason)` ends prompt i in the engine. `texts`, one per prompt: the engine delivers tokens without text
    and knows no stop strings; None: its outputs are complete. Tokens that it makes after a stop string are dropped.
    """

    def __init__(self, prompts: int, cancel: Callable[[int, str], None], texts: Sequence[StopText] | None) -> None:
        self._cancel, self._texts = cancel, texts
        self.cached = [0] * prompts  # tokens of each that the prefix cache had
        self._running = set(range(prompts))
        self._arrived: list[tuple[int, Output]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failure: Exception | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that the prefix cache had, of those prompts that have an output."""
        return sum(self.cached)

    def put_cached(self, i: int, tokens: int) -> None:
        """The prefix cache had so many tokens of prompt i."""
        self.cached[i] = tokens

    def put(self, i: int, output: Output) -> None:
        """An output of the engine."""
        self._arrived.append((i, output))
        self._wake()

    def fail(self, e: Exception) -> None:
        """No prompt runs: `batch` raises `e`."""
        self._failure = e
        self._running.clear()
        self._wake()

    @property
    def closed(self) -> bool:
        """No prompt runs, nor will."""
        return not self._running

    async def batch(self) -> list[tuple[int, Output]]:
        """The outputs since the last call, at least one: it waits for one. Empty once every prompt has ended."""
        while self._running:
            if not self._arrived:
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            arrived, self._arrived = self._arrived, []
            outputs = [(i, self._complete(i, output)) for i, output in arrived if i in self._running]
            if outputs:
                return outputs
        if self._failure:
            raise self._failure
        return []

    def close(self) -> None:
        """Cancel the prompts that have not ended."""
        running, self._running = self._running, set()
        for i in running:
            self._cancel(i, "cancelled")
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _complete(self, i: int, output: Output) -> Output:
        """The output with its text; it is the prompt's last if a stop string ends here."""
        reason = output.finish_reason
        if self._texts is not None and output.token is not None:
            text, stopped = self._text(self._texts[i], output.token, reason)
            if stopped:
                if reason is None:
                    self._cancel(i, "stop")
                reason = "stop"
            output = Output(output.token, text, output.logprob, reason, output.prompt_logprobs)
        elif self._texts is not None and reason == "stop":  # its grammar ends with the token before
            output = Output(None, self._texts[i].flush()[0], finish_reason=reason)
        if reason is not None:
            self._running.discard(i)
        return output

    def _text(self, text: StopText, token: int, reason: str | None) -> tuple[str, bool]:
        """(text that is now final, whether a stop string ended it)."""
        if reason == "stop":  # by a stop token, which has no text
            return text.flush()[0], False
        made, stopped = text.push(token)
        if reason is not None and not stopped:
            rest, stopped = text.flush()
            made += rest
        return made, stopped
