"""What a server needs of an engine: AsyncLLM has it in the engine's process, server/ipc/engine_client.py in others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer


class RequestLimits(NamedTuple):
    """What bounds a request, or the prompts of one."""

    slots: int  # sequences at once
    max_waiting: int  # requests in the queue
    max_seq_len: int  # tokens, prompt and completion


class Status(NamedTuple):
    """An engine at one moment."""

    alive: bool  # it takes requests
    metrics: str  # in Prometheus' text format


class ServingEngine(Protocol):
    """An engine for asyncio."""

    @property
    def tokenizer(self) -> Tokenizer | ByteTokenizer: ...

    @property
    def limits(self) -> RequestLimits: ...

    def submit(self, prompts: Sequence[Sequence[int]], params: Params) -> OutputStream:
        """The outputs of the prompts, in batches as they arrive, in the running event loop; close it at the end.

        With params.n > 1 each prompt comes n times in a row; the others start from the states of the first.
        Here or in the first batch: JetExportError for a prompt that could never run, QueueFull if too many requests
        wait; then none runs.
        """
        ...

    async def status(self) -> Status: ...

    def running(self) -> AbstractAsyncContextManager[None]:
        """The engine, or the connection to it, is up inside."""
        ...
