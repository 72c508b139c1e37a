"""The index of the prefix cache: which states are cached, after which tokens, and where. Plain Python, no tensors.

An entry is the state after `end` tokens, wherever that is. On the device it has a row with the recurrent, convolution
and window states, and the KV pages of its tokens, shared with the requests that made it and that start from it. Pages
are only ever appended to, so an entry's own tokens stay as they are in a last page that its maker goes on writing; a
request that starts from it takes a copy of that page. On the host an entry is one block of bytes.

Entries are found by the chained hash of their whole pages, and the tokens after these: a lookup costs a hash a page.
Each tier is in order of use, least recently used first, except for superseded entries: once a request starts from an
entry, such as the end of a turn, those on the way to it are of use only if others share them, and go first. The hashes
of recent prompts' pages are remembered without states: where a second prompt branches off a first, such as after a
system prompt, its states are cached for the third.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from jet_export.runtime.plan import Request
from jet_export.runtime.pools import Pool

REMEMBERED = 1 << 16  # page hashes of recent prompts

Key = tuple[bytes, tuple[int, ...]]  # hash of the whole pages, and the tokens after them


@dataclass(eq=False, kw_only=True)
class Entry:
    """The states after `end` tokens: on the device in `row` and `pages`, or on the host from byte `at`."""

    key: Key
    end: int
    row: int = -1
    pages: tuple[int, ...] = ()  # of all its tokens; the last may hold others' tokens behind them
    at: int | None = None
    parent: Key | None = None  # the entry that its maker started from or cached before
    hits: int = 0  # requests that started from it
    superseded: bool = False  # the first to be evicted, and not to the host


def page_hashes(tokens: Sequence[int], page_size: int, known: Sequence[bytes] = ()) -> tuple[bytes, ...]:
    """For each whole page of `tokens` a chained hash of everything up to its end; the first are `known`."""
    hashes = list(known[: len(tokens) // page_size])
    for end in range((len(hashes) + 1) * page_size, len(tokens) + 1, page_size):
        before = hashes[-1] if hashes else b""
        hashes.append(hashlib.sha256(before + array("q", tokens[end - page_size : end]).tobytes()).digest())
    return tuple(hashes)


class PrefixCache:
    """Entries on the device and on the host."""

    def __init__(self, pages: Pool, *, rows: int, page_size: int) -> None:
        self.pages, self.rows, self.page_size = pages, Pool(rows), page_size
        self.entries: OrderedDict[Key, Entry] = OrderedDict()  # on the device
        self.hosted: OrderedDict[Key, Entry] = OrderedDict()
        self.held: Counter[int] = Counter()  # page -> number of entries that hold it
        self.tails: dict[bytes, Counter[int]] = {}  # hash -> numbers of tokens after it that entries have
        self.seen: OrderedDict[bytes, None] = OrderedDict()  # hashes of recent prompts' pages
        self.claims: dict[bytes, Request] = {}  # hash -> the running request that will cache the states after it

    def key(self, tokens: Sequence[int], hashes: Sequence[bytes]) -> Key:
        whole = len(tokens) // self.page_size
        return hashes[whole - 1] if whole else b"", tuple(tokens[whole * self.page_size :])

    def find(self, text: Sequence[int], hashes: Sequence[bytes], max_tokens: int) -> Entry | None:
        """The entry of the longest prefix of `text`, of at most `max_tokens` tokens."""
        for whole in range(min(max_tokens, len(text)) // self.page_size, -1, -1):
            first, before = whole * self.page_size, hashes[whole - 1] if whole else b""
            for n in sorted(self.tails.get(before, ()), reverse=True):
                key = before, tuple(text[first : first + n])
                entry = self.entries.get(key) or self.hosted.get(key)
                if entry is not None and entry.end <= max_tokens:
                    self.touch(entry)
                    return entry
        return None

    def remember(self, request: Request) -> int:
        """Remember the pages of a new prompt; tokens of those that it shares with an earlier one, the last left out."""
        pages = request.hashes[: (request.prompt_len - 1) // self.page_size]
        shared = next((i for i in range(len(pages), 0, -1) if pages[i - 1] in self.seen), 0)
        for page in request.hashes:
            self.seen[page] = None
            self.seen.move_to_end(page)
        while len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        return shared * self.page_size

    def claim(self, request: Request, end: int) -> None:
        """The request caches the states after `end` tokens of its prompt, whole pages, unless another is about to."""
        if self.claims.setdefault(request.hashes[end // self.page_size - 1], request) is request:
            request.branch = end

    def release(self, request: Request) -> None:
        """The request no longer runs."""
        if request.branch:
            del self.claims[request.hashes[request.branch // self.page_size - 1]]
            request.branch = 0

    def use(self, entry: Entry) -> None:
        """A request starts from an entry: those on the way to it are superseded, if at most one request used them."""
        entry.hits, entry.superseded, key = entry.hits + 1, False, entry.parent
        while key is not None and (before := self.entries.get(key)) is not None:
            if before.superseded or before.hits > 1:
                break
            before.superseded = True
            self.entries.move_to_end(key, last=False)
            key = before.parent

    def touch(self, entry: Entry) -> None:
        (self.entries if entry.at is None else self.hosted).move_to_end(entry.key)

    def add(self, entry: Entry) -> None:
        """Put an entry where it says it is; the pages are shared."""
        self._count(entry, 1)
        if entry.at is not None:
            self.hosted[entry.key] = entry
            return
        self.pages.share(entry.pages)
        self.held.update(entry.pages)
        self.entries[entry.key] = entry

    def remove(self, entry: Entry) -> None:
        """Forget an entry; its row and pages are free. The caller frees its memory on the host."""
        self._count(entry, -1)
        if entry.at is not None:
            del self.hosted[entry.key]
            return
        del self.entries[entry.key]
        self.rows.give([entry.row])
        self.pages.give(entry.pages)
        for page in entry.pages:
            self.held[page] -= 1
            if not self.held[page]:
                del self.held[page]

    def _count(self, entry: Entry, n: int) -> None:
        before, tail = entry.key
        lengths = self.tails.setdefault(before, Counter())
        lengths[len(tail)] += n
        if not lengths[len(tail)]:
            del lengths[len(tail)]
        if not lengths:
            del self.tails[before]
