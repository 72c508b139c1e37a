"""`AsyncLLM(bundle)`: streams of tokens for asyncio, over in-flight batching."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from jet_export.runtime.batching import BatchingEngine, Serving
from jet_export.runtime.engine import load_engine
from jet_export.runtime.params import Output, Params
from jet_export.runtime.tokenizer import load_tokenizer


class AsyncLLM:
    """A bundle, loaded, that many tasks use at once. `start` it before use and `stop` it at the end.

    Raises JetExportError where the bundle is damaged or made for another machine.
    """

    def __init__(self, bundle: str | Path, serving: Serving | None = None, cuda_graphs: bool = True) -> None:
        engine, manifest = load_engine(bundle)
        self.batching = BatchingEngine(
            engine, load_tokenizer(bundle), manifest.config.eos_token_id, serving, cuda_graphs
        )

    @classmethod
    def over(cls, batching: BatchingEngine) -> AsyncLLM:
        llm = cls.__new__(cls)
        llm.batching = batching
        return llm

    def start(self) -> None:
        self.batching.start()

    def stop(self) -> None:
        self.batching.stop()

    async def stream(
        self, prompts: Sequence[Sequence[int]], params: Params
    ) -> AsyncGenerator[tuple[int, Output], None]:
        """(index of the prompt, Output) as they come, until each prompt has ended. Closing it cancels what is left.

        Raises JetExportError for a prompt that could never run, QueueFull where too many wait; then none of them runs.
        """
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

        def tell(i: int) -> Callable[[Output], None]:
            def put(output: Output) -> None:
                loop.call_soon_threadsafe(outputs.put_nowait, (i, output))

            return put

        left = []
        try:
            for i, prompt in enumerate(prompts):
                left.append(self.batching.submit(list(prompt), params, tell(i)))
            running = len(left)
            while running:
                i, output = await outputs.get()
                running -= output.finish_reason is not None
                yield i, output
        finally:
            for sequence in left:
                self.batching.cancel(sequence)
