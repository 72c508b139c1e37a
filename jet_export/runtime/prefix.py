"""Shared prompt prefixes: what the states were after the first chunks of a prompt, for the next prompt that begins so.

Plain Python, no tensors: an entry holds an opaque snapshot of the states and names the KV pages of its tokens, which it
shares, read-only, with every request that began from it (the pool counts who holds a page). Entries lie at multiples of
`interval`, a whole number of pages and of prefill chunks, so nobody ever writes into a shared page, and a prompt is cut
into the same chunks with the cache and without. The least recently used entries make room.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class Pool:
    """Numbered things, each free or held, by one holder or several."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))  # the lowest number last: it is taken first
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
        """One more holder of things that are held already."""
        for i in items:
            assert self.holders[i] > 0
            self.holders[i] += 1

    def give(self, items: Iterable[int]) -> None:
        """One holder less; a thing that nobody holds is free."""
        for i in items:
            assert self.holders[i] > 0
            self.holders[i] -= 1
            if not self.holders[i]:
                self._free.append(i)


@dataclass(eq=False, frozen=True)
class Entry:
    """The first `end` tokens of some prompts: their KV pages, and a snapshot of the other states after them."""

    key: bytes
    end: int
    pages: tuple[int, ...]
    snapshot: Any
    size: int  # of the snapshot, bytes


def prefix_keys(tokens: Sequence[int], interval: int) -> tuple[bytes, ...]:
    """A key for each whole interval of `tokens`: a hash of all up to its end, each made from the one before."""
    keys, key = [], b""
    for end in range(interval, len(tokens) + 1, interval):
        key = hashlib.sha256(key + array("q", tokens[end - interval : end]).tobytes()).digest()
        keys.append(key)
    return tuple(keys)


class PrefixCache:
    """Entries by key, the least recently used first. Snapshots and the pages held take `max_bytes` at most."""

    def __init__(self, pages: Pool, interval: int, page_bytes: int, max_bytes: int) -> None:
        self.pool, self.interval, self.page_bytes, self.max_bytes = pages, interval, page_bytes, max_bytes
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.held: Counter[int] = Counter()  # pages, and the entries that hold each
        self.snapshot_bytes = 0
        self.evictions = 0

    @property
    def size(self) -> int:
        return self.snapshot_bytes + len(self.held) * self.page_bytes

    def find(self, keys: Sequence[bytes], most: int) -> Entry | None:
        """The longest entry of at most `most` tokens on the way that `keys` name."""
        for key in reversed(keys[: most // self.interval]):
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key]
        return None

    def fits(self, pages: int, snapshot_bytes: int) -> bool:
        return snapshot_bytes + pages * self.page_bytes <= self.max_bytes

    def add(self, entry: Entry) -> None:
        """Keep an entry whose pages are held by its request; others go where there is no room. Not if it never fits."""
        if entry.key in self.entries or not self.fits(len(entry.pages), entry.size):
            return
        self.pool.share(entry.pages)
        self.entries[entry.key] = entry
        self.held.update(entry.pages)
        self.snapshot_bytes += entry.size
        while self.size > self.max_bytes:
            self.evict(entry)

    def evict(self, keep: Entry | None = None) -> bool:
        """Drop the least recently used entry but `keep`. False where there is none."""
        entry = next((e for e in self.entries.values() if e is not keep), None)
        if entry is None:
            return False
        del self.entries[entry.key]
        self.pool.give(entry.pages)
        self.held -= Counter(entry.pages)
        self.snapshot_bytes -= entry.size
        self.evictions += 1
        return True
