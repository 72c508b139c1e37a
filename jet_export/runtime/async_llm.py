"""`AsyncLLM(bundle)`: streams of tokens for asyncio, over continuous batching."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from jet_export.backends.load import load_engine
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.mailbox import Mailbox
from jet_export.runtime.params import Output, Params
from jet_export.runtime.sequence import Keep, OnOutput, RunningSequence
from jet_export.runtime.sessions import Session, Sessions
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.utils.errors import JetExportError


class AsyncLLM(Sessions):
    """A loaded bundle that many asyncio tasks share. `start` it before use and `stop` it at the end.

    Raises JetExportError if the bundle is damaged or was built for another machine.
    """

    def __init__(self, bundle: str | Path, serving: Serving | None = None, *, cuda_graphs: bool = True) -> None:
        self.engine, manifest = load_engine(bundle)
        self.fingerprint = manifest.fingerprint
        tokenizer, eos = load_tokenizer(bundle), manifest.config.eos_token_id
        self.batching = BatchingEngine(self.engine, tokenizer, eos, serving, cuda_graphs=cuda_graphs)
        self.mailbox = Mailbox(self.batching)

    @classmethod
    def over(cls, batching: BatchingEngine, fingerprint: str = "") -> AsyncLLM:
        """An AsyncLLM over a BatchingEngine. `fingerprint` identifies its bundle, for sessions."""
        llm = cls.__new__(cls)
        llm.batching, llm.engine, llm.fingerprint = batching, batching.engine, fingerprint
        llm.mailbox = Mailbox(batching)
        return llm

    def start(self) -> None:
        self.batching.start()

    def stop(self) -> None:
        self.batching.stop()

    async def session(self, prompt: Sequence[int]) -> Session:
        """A new session that holds `prompt`, at least one token id; nothing is generated yet.

        Raises JetExportError for a prompt that could never run or failed, QueueFull if too many requests wait.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def on_output(_: Output) -> None:
            loop.call_soon_threadsafe(ended.set)

        sequence = self.batching.submit(list(prompt), Params(1), on_output, keep="prompt", text=False)
        try:
            await ended.wait()
        finally:
            self.batching.cancel(sequence)
        if sequence.snapshot is None:
            raise JetExportError(f"The prompt did not run ({sequence.finish_reason}).", "Try again.")
        return Session(sequence.snapshot, self.fingerprint)

    async def stream(
        self, prompts: Sequence[Sequence[int]], params: Params, sessions: Sequence[Session] | None = None
    ) -> AsyncGenerator[tuple[int, Output], None]:
        """Yield (index of the prompt, Output) until every prompt has ended. Closing the generator cancels the rest.

        `sessions`, one per prompt: the prompt, which may be empty, continues its session, and the session then holds
        the prompt and the completion too; the session of a request that was cancelled or failed stays as it was.
        Raises JetExportError for a prompt that could never run, QueueFull if too many requests wait; then none runs.
        """
        outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

        def forward(i: int) -> OnOutput:
            return self.mailbox.sender(asyncio.get_running_loop(), outputs, i)

        claimed = self._claim(sessions, len(prompts))
        submitted: list[RunningSequence] = []
        try:
            for i, prompt in enumerate(prompts):
                start = claimed[i].snapshot if claimed else None
                keep: Keep | None = "end" if claimed else None
                submitted.append(self.batching.submit(list(prompt), params, forward(i), start=start, keep=keep))
            running = len(submitted)
            while running:
                i, output = await outputs.get()
                running -= output.finish_reason is not None
                if claimed and output.finish_reason is not None:
                    claimed[i].snapshot = submitted[i].snapshot or claimed[i].snapshot
                yield i, output
        finally:
            for sequence in submitted:
                self.batching.cancel(sequence)
            for session in claimed:
                session.busy = False

    def _claim(self, sessions: Sequence[Session] | None, prompts: int) -> list[Session]:
        """Mark the sessions as in use. Raises JetExportError if one already is, or their number is not `prompts`."""
        given = list(sessions or ())
        if sessions is not None and len(given) != prompts:
            raise JetExportError(f"{prompts} prompts and {len(given)} sessions.", "Give one session for each prompt.")
        claimed: list[Session] = []
        try:
            for session in given:
                session.check(self.fingerprint)
                session.busy = True
                claimed.append(session)
        except JetExportError:
            for session in claimed:
                session.busy = False
            raise
        return given
