"""A ServingEngine that answers with given texts, in pieces of given lengths: for what servers make of an answer."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import cycle

from jet_export.runtime.output_stream import OutputStream
from jet_export.runtime.params import Output, Params
from jet_export.runtime.serving_engine import RequestLimits, Status
from jet_export.runtime.tokenizer import ByteTokenizer


class ScriptedEngine:
    """Prompts of one call get `answers` in turn, each a text and its finish reason. `submitted`: what it was asked."""

    def __init__(self, *answers: tuple[str, str], lengths: Sequence[int] = (1,)) -> None:
        self.answers, self.lengths = answers, lengths
        self.tokenizer, self.limits = ByteTokenizer(), RequestLimits(4, 4, 4096)
        self.submitted: list[tuple[list[list[int]], Params]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def status(self) -> Status:
        return Status(True, "")

    def submit(self, prompts: Sequence[Sequence[int]], params: Params) -> OutputStream:
        self.submitted.append(([list(p) for p in prompts], params))
        stream = OutputStream(len(prompts), lambda i, reason: None, None)
        for i, (text, reason) in zip(range(len(prompts)), cycle(self.answers), strict=False):
            lengths, at = cycle(self.lengths), 0
            while at < len(text):
                n = next(lengths)
                stream.put(i, Output(65, text[at : at + n]))
                at += n
            stream.put(i, Output(66, finish_reason=reason))
        return stream
