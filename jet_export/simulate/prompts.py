"""Prompts that are not written out: sequences of tokens that are equal where the load says that prompts are.

A session's tokens, prompts and answers, are one sequence of which each turn's prompt is the beginning. Pages have
hashes that are equal where the pages and all before them are (runtime/prefix.py), made from numbers, not from tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from jet_export.simulate.load import Arrival
from jet_export.simulate.trace import BLOCK

STREAM = 1 << 31  # tokens of a sequence, at most: token i of sequence s is s * STREAM + i


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's tokens, the answer included, and the hashes of their whole pages."""

    tokens: Sequence[int]
    hashes: tuple[bytes, ...]


class Prompts:
    """Makes the prompts of a load's requests, in order of arrival."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.streams: dict[str, int] = {}  # session -> its sequence
        self.pages: dict[int, tuple[bytes, ...]] = {}  # sequence of a session -> hashes of its pages so far
        self.fresh = itertools.count(1)

    def of(self, arrival: Arrival) -> Prompt:
        length = arrival.prompt + arrival.output
        if arrival.blocks:
            return self._of_blocks(arrival, length)
        if not arrival.session:
            stream = next(self.fresh)
            return Prompt(range(stream * STREAM, stream * STREAM + length), self._hashes(stream, 0, length))
        if arrival.session not in self.streams:
            self.streams[arrival.session] = next(self.fresh)
        stream = self.streams[arrival.session]
        known = self.pages.get(stream, ())
        if len(known) < length // self.page_size:
            known += self._hashes(stream, len(known), length)
            self.pages[stream] = known
        hashes = known[: length // self.page_size]
        return Prompt(range(stream * STREAM, stream * STREAM + length), hashes)

    def _hashes(self, stream: int, first: int, length: int) -> tuple[bytes, ...]:
        name = stream.to_bytes(8)
        return tuple(name + page.to_bytes(4) for page in range(first, length // self.page_size))

    def _of_blocks(self, arrival: Arrival, length: int) -> Prompt:
        tokens = BlockTokens(arrival.blocks, arrival.prompt, range(next(self.fresh) * STREAM, 1 << 62)[:length])
        size, whole = self.page_size, arrival.prompt // self.page_size
        hashes = []
        for page in range(length // size):
            if page < whole:
                block, within = divmod((page + 1) * size - 1, BLOCK)
                hashes.append(arrival.blocks[block].to_bytes(12, signed=True) + within.to_bytes(4))
            else:
                hashes.append(tokens.answer[page].to_bytes(12) + b"page")
        return Prompt(tokens, tuple(hashes))


class BlockTokens(Sequence[int]):
    """A prompt of blocks, and an answer that nothing else has; negative tokens are those of blocks."""

    def __init__(self, blocks: tuple[int, ...], prompt: int, answer: range) -> None:
        self.blocks, self.prompt, self.answer = blocks, prompt, answer

    def __len__(self) -> int:
        return len(self.answer)

    @overload
    def __getitem__(self, i: int) -> int: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[int]: ...

    def __getitem__(self, i: int | slice) -> int | Sequence[int]:
        if isinstance(i, slice):
            start, stop, step = i.indices(len(self))
            if start == 0 and step == 1:
                return BlockTokens(self.blocks, min(self.prompt, stop), self.answer[:stop])
            return [self[j] for j in range(start, stop, step)]
        if i >= self.prompt:
            return self.answer[i]
        return -1 - (self.blocks[i // BLOCK] * BLOCK + i % BLOCK)
