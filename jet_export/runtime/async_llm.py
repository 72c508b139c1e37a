"""`AsyncLLM(bundle)`: streams of tokens for asyncio, over in-flight batching."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from jet_export.backends.load import load_engine
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output, Params
from jet_export.runtime.sequence import Sequence as Running
from jet_export.runtime.sessions import Session, Sessions
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.utils.errors import JetExportError


class AsyncLLM(Sessions):
    """A bundle, loaded, that many tasks use at once. `start` it before use and `stop` it at the end.

    Raises JetExportError where the bundle is damaged or made for another machine.
    """

    def __init__(self, bundle: str | Path, serving: Serving | None = None, cuda_graphs: bool = True) -> None:
        self.engine, manifest = load_engine(bundle)
        self.fingerprint = manifest.fingerprint
        self.batching = BatchingEngine(
            self.engine, load_tokenizer(bundle), manifest.config.eos_token_id, serving, cuda_graphs
        )

    @classmethod
    def over(cls, batching: BatchingEngine, fingerprint: str = "") -> AsyncLLM:
        llm = cls.__new__(cls)
        llm.batching, llm.engine, llm.fingerprint = batching, batching.engine, fingerprint
        return llm

    def start(self) -> None:
        self.batching.start()

    def stop(self) -> None:
        self.batching.stop()

    async def session(self, prompt: Sequence[int]) -> Session:
        """A new session that holds `prompt`, at least one token id; nothing is generated yet.

        Raises JetExportError for a prompt that could never run and where it did not, QueueFull where too many wait.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: Output) -> None:
            loop.call_soon_threadsafe(ended.set)

        running = self.batching.submit(list(prompt), Params(1), tell, keep="prompt", text=False)
        try:
            await ended.wait()
        finally:
            self.batching.cancel(running)
        if running.snapshot is None:
            raise JetExportError(f"The prompt did not run ({running.finish_reason}).", "Try again.")
        return Session(running.snapshot, self.fingerprint)

    async def stream(
        self, prompts: Sequence[Sequence[int]], params: Params, sessions: Sequence[Session] | None = None
    ) -> AsyncGenerator[tuple[int, Output], None]:
        """(index of the prompt, Output) as they come, until each prompt has ended. Closing it cancels what is left.

        `sessions`, one for each prompt: a prompt, which may be empty, comes after what its session holds, and the
        session holds both and the completion once it has ended; one that was cancelled or failed stays as it was.
        Raises JetExportError for a prompt that could never run, QueueFull where too many wait; then none of them runs.
        """
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

        def tell(i: int) -> Callable[[Output], None]:
            def put(output: Output) -> None:
                loop.call_soon_threadsafe(outputs.put_nowait, (i, output))

            return put

        used = self._claim(sessions, len(prompts))
        left: list[Running] = []
        try:
            for i, prompt in enumerate(prompts):
                start = used[i].snapshot if used else None
                left.append(self.batching.submit(list(prompt), params, tell(i), start, "end" if used else None))
            running = len(left)
            while running:
                i, output = await outputs.get()
                running -= output.finish_reason is not None
                if used and output.finish_reason is not None:
                    used[i].snapshot = left[i].snapshot or used[i].snapshot
                yield i, output
        finally:
            for sequence in left:
                self.batching.cancel(sequence)
            for session in used:
                session.busy = False

    def _claim(self, sessions: Sequence[Session] | None, prompts: int) -> list[Session]:
        """Mark the sessions as in use. Raises JetExportError where one already is, or they do not fit the prompts."""
        used = list(sessions or ())
        if sessions is not None and len(used) != prompts:
            raise JetExportError(f"{prompts} prompts and {len(used)} sessions.", "Give one session for each prompt.")
        claimed: list[Session] = []
        try:
            for session in used:
                session.check(self.fingerprint)
                session.busy = True
                claimed.append(session)
        except JetExportError:
            for session in claimed:
                session.busy = False
            raise
        return used
