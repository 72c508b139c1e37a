"""The prefix cache: the states after the first chunks of a prompt, for later prompts with the same prefix.

Plain Python, no tensors: an entry holds an opaque snapshot of the states, and the KV pages of its tokens, which it
shares read-only with every request that starts from it (the pool counts references). Entries end at multiples of
`interval`, a whole number of pages and of prefill chunks: shared pages are never written to, and a prompt is split into
the same chunks with and without the cache. Eviction is least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class Pool:
    """Numbered slots or pages, reference-counted."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))  # descending: the lowest number is taken first
        self.holders = [0] * size

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.size - self.free

    def take(self, n: int) -> list[int]:
        assert n <= self.free
        items = [self._free.pop() for _ in range(n)]
        for i in items:
            self.holders[i] = 1
        return items

    def share(self, items: Iterable[int]) -> None:
        """Add a reference to items that are in use already."""
        for i in items:
            assert self.holders[i] > 0
            self.holders[i] += 1

    def give(self, items: Iterable[int]) -> None:
        """Drop a reference; an item without references is free."""
        for i in items:
            assert self.holders[i] > 0
            self.holders[i] -= 1
            if not self.holders[i]:
                self._free.append(i)


@dataclass(eq=False, frozen=True, kw_only=True)
class Entry:
    """A prefix of `end` tokens: its KV pages, and a snapshot of the other states after it."""

    key: bytes
    end: int
    pages: tuple[int, ...]
    snapshot: Any
    size: int  # bytes of the snapshot


def prefix_keys(tokens: Sequence[int], interval: int) -> tuple[bytes, ...]:
    """A key for each whole interval of `tokens`: a chained hash of everything up to its end."""
    keys, key = [], b""
    for end in range(interval, len(tokens) + 1, interval):
        key = hashlib.sha256(key + array("q", tokens[end - interval : end]).tobytes()).digest()
        keys.append(key)
    return tuple(keys)


class PrefixCache:
    """Entries by key, least recently used first. Their snapshots and pages take at most `max_bytes`."""

    def __init__(self, pages: Pool, *, interval: int, page_bytes: int, max_bytes: int) -> None:
        self.pool, self.interval, self.page_bytes, self.max_bytes = pages, interval, page_bytes, max_bytes
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.held: Counter[int] = Counter()  # page -> number of entries that hold it
        self.snapshot_bytes = 0
        self.evictions = 0

    @property
    def size(self) -> int:
        return self.snapshot_bytes + len(self.held) * self.page_bytes

    def find(self, keys: Sequence[bytes], max_tokens: int) -> Entry | None:
        """The longest cached prefix among `keys`, of at most `max_tokens` tokens."""
        for key in reversed(keys[: max_tokens // self.interval]):
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key]
        return None

    def fits(self, pages: int, snapshot_bytes: int) -> bool:
        return snapshot_bytes + pages * self.page_bytes <= self.max_bytes

    def add(self, entry: Entry) -> None:
        """Cache an entry while its request holds its pages; evict others to make room. Ignored if it can never fit."""
        if entry.key in self.entries or not self.fits(len(entry.pages), entry.size):
            return
        self.pool.share(entry.pages)
        self.entries[entry.key] = entry
        self.held.update(entry.pages)
        self.snapshot_bytes += entry.size
        while self.size > self.max_bytes:
            self.evict(entry)

    def evict(self, keep: Entry | None = None) -> bool:
        """Drop the least recently used entry other than `keep`. False if there is none."""
        entry = next((e for e in self.entries.values() if e is not keep), None)
        if entry is None:
            return False
        del self.entries[entry.key]
        self.pool.give(entry.pages)
        self.held -= Counter(entry.pages)
        self.snapshot_bytes -= entry.size
        self.evictions += 1
        return True
