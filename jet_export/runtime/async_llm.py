"""`AsyncLLM(bundle)`: streams of tokens for asyncio, over continuous batching."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from jet_export.backends.load import load_engine
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.grammar_compile import in_loop
from jet_export.runtime.mailbox import Mailbox
from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output, Params
from jet_export.runtime.sequence import Keep, RunningSequence
from jet_export.runtime.serving_engine import RequestLimits, Status
from jet_export.runtime.sessions import Session, Sessions
from jet_export.runtime.tokenizer import ByteTokenizer, StopText, Tokenizer, load_eos, load_tokenizer
from jet_export.utils.errors import JetExportError


class AsyncLLM(Sessions):
    """A loaded bundle that many asyncio tasks share. `start` it before use and `stop` it at the end.

    Raises JetExportError if the bundle is damaged or was built for another machine.
    """

    def __init__(self, bundle: str | Path, serving: Serving | None = None, *, cuda_graphs: bool = True) -> None:
        self.engine, manifest = load_engine(bundle)
        self.fingerprint = manifest.fingerprint
        config, tokenizer = manifest.config, load_tokenizer(bundle)
        eos = load_eos(bundle, config.eos_token_id, config.vocab_size)
        self.batching = BatchingEngine(self.engine, tokenizer, eos, serving, cuda_graphs=cuda_graphs)
        self.mailbox = Mailbox(self.batching)

    @classmethod
    def over(cls, batching: BatchingEngine, fingerprint: str = "") -> AsyncLLM:
        """An AsyncLLM over a BatchingEngine. `fingerprint` identifies its bundle, for sessions."""
        llm = cls.__new__(cls)
        llm.batching, llm.engine, llm.fingerprint = batching, batching.engine, fingerprint
        llm.mailbox = Mailbox(batching)
        return llm

    @property
    def tokenizer(self) -> Tokenizer | ByteTokenizer:
        return self.batching.tokenizer

    @property
    def limits(self) -> RequestLimits:
        c = self.batching.scheduler.capacity
        return RequestLimits(c.slots, c.max_waiting, c.longest)

    async def status(self) -> Status:
        return Status(self.batching.alive, self.batching.render_metrics())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Started inside, and stopped at the end."""
        self.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.stop)

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

    def submit(self, prompts: Sequence[Sequence[int]], params: Params) -> OutputStream:
        """The outputs of the prompts, in batches as they arrive, in the running event loop; close it at the end.

        With params.n > 1 each prompt comes n times in a row; the others start from the states of the first.
        Raises JetExportError for a prompt that could never run, QueueFull if too many requests wait; then none runs.
        """
        texts = [StopText(self.tokenizer, params.stop) for _ in prompts]
        outputs, _ = self._submit(prompts, replace(params, stop=()), texts)
        return outputs

    async def stream(
        self, prompts: Sequence[Sequence[int]], params: Params, sessions: Sequence[Session] | None = None
    ) -> AsyncGenerator[tuple[int, Output], None]:
        """Yield (index of the prompt, Output) until every prompt has ended. Closing the generator cancels the rest.

        `sessions`, one per prompt: the prompt, which may be empty, continues its session, and the session then holds
        the prompt and the completion too; the session of a request that was cancelled or failed stays as it was.
        Raises JetExportError for a prompt that could never run, QueueFull if too many requests wait; then none runs.
        """
        claimed = self._claim(sessions, len(prompts))
        submitted: list[RunningSequence] = []
        outputs: OutputStream | None = None
        try:
            if claimed:  # a session ends where the text does, so the engine looks for the stop strings
                outputs, submitted = self._submit(prompts, params, None, claimed)
            else:
                outputs = self.submit(prompts, params)
            while batch := await outputs.batch():
                for i, output in batch:
                    if claimed and output.finish_reason is not None:
                        claimed[i].snapshot = submitted[i].snapshot or claimed[i].snapshot
                    yield i, output
        finally:
            if outputs is not None:
                outputs.close()
            for session in claimed:
                session.busy = False

    def _submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: Params,
        texts: list[StopText] | None,
        sessions: Sequence[Session] = (),
    ) -> tuple[OutputStream, list[RunningSequence]]:
        """`texts` None: the engine makes the text, and looks for stop strings."""
        submitted: list[RunningSequence] = []
        loop = asyncio.get_running_loop()
        keep: Keep | None = "end" if sessions else None

        def cancel(i: int, reason: str) -> None:
            if submitted:  # otherwise a grammar is being compiled
                self.batching.cancel(submitted[i], reason)

        outputs = OutputStream(len(prompts), cancel, texts)

        def put(i: int, output: Output) -> None:
            outputs.put_cached(i, submitted[i].cached_tokens)
            outputs.put(i, output)

        def run() -> None:
            try:
                for i, prompt in enumerate(prompts):
                    submitted.append(
                        self.batching.submit(
                            list(prompt),
                            params,
                            self.mailbox.sender(loop, put, i),
                            start=sessions[i].snapshot if sessions else None,
                            keep=keep,
                            text=texts is None,
                            leader=submitted[i - i % params.n] if i % params.n else None,
                            choice=i % params.n,
                        )
                    )
            except BaseException:
                for sequence in submitted:
                    self.batching.cancel(sequence)
                raise

        def compiled(error: JetExportError | None) -> None:
            try:
                if error is not None:
                    raise error
                if not outputs.closed:
                    run()
            except JetExportError as e:
                outputs.fail(e)

        if params.grammar is None:
            run()
        else:
            self.batching.grammars.start(params.grammar, in_loop(loop, compiled))
        return outputs, submitted

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
