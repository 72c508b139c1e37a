"""Slots, pages, the prefix cache and the host's memory: who has what, and what makes room. Plain Python, no tensors.

Room for a running request is made by evicting prefix cache entries, least recently used first; what they hold moves to
the host, within `host_bytes`, and the least recently used entries there are forgotten. States of preempted requests
go there too and are never forgotten for a prefix. Copies are launched as they are decided, through `Copies`: the
device runs them in that order, before the step that is being planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from jet_export.runtime.plan import Capacity, Request
from jet_export.runtime.pools import Arena, Pool
from jet_export.runtime.prefix import Entry, PrefixCache, page_hashes

SHORTEST = 16  # tokens: a shorter prefix is not worth a row of the cache
LARGEST = 256 << 20  # bytes moved to the host for one request, and for the prefixes evicted in one step


class Copies(Protocol):
    """Copies of states. A request's slot, pages, window_pages and held say where its states are.

    Those to the host return False if the device has no memory for them; nothing is copied then.
    """

    def slot_to_row(self, request: Request, row: int) -> None: ...

    def row_to_slot(self, row: int, request: Request, page: int | None) -> None:
        """`page`: the request's last page starts as a copy of this one."""

    def row_to_host(self, entry: Entry, at: int) -> bool: ...

    def slot_to_host(self, request: Request, at: int) -> bool: ...

    def host_to_slot(self, at: int, request: Request) -> None: ...


@dataclass
class MemoryCounts:
    """What has happened so far."""

    queries: int = 0  # requests that looked for their prompt in the cache
    hits: int = 0  # and found some of it, on the device
    host_hits: int = 0  # or on the host
    hit_tokens: int = 0  # prompt tokens found
    evictions: int = 0  # from the device, to the host or altogether
    preemptions: int = 0
    bytes_out: int = 0  # moved to the host
    bytes_in: int = 0  # and back


class Memory:
    """See the module. Not thread-safe; only the thread that plans may call what copies: all but `release`."""

    def __init__(self, capacity: Capacity, copies: Copies) -> None:
        self.capacity, self.copies = capacity, copies
        self.slots = Pool(capacity.slots)
        self.pages = Pool(capacity.pages)
        self.window_pages = Pool(capacity.window_pages)
        self.host = Arena(capacity.host_bytes)
        self.counts = MemoryCounts()
        self.evicted_bytes = 0  # to the host, for the plan being made
        self.prefixes: PrefixCache | None = None
        if capacity.prefix_interval:
            self.prefixes = PrefixCache(self.pages, rows=capacity.prefix_rows, page_size=capacity.page_size)

    def admit(self, request: Request, headroom: int) -> bool:
        """Give a request a slot, the pages it needs now and the states it starts from, if `headroom` pages are left."""
        c, entry = self.capacity, self._find(request)
        pages, window = c.pages_for(request.length)[0], c.pages_for(request.max_held)[1]
        if not self.slots.free or window > self.window_pages.free:
            return False
        shared = self._shared(entry)
        if not self.make_room(pages - len(shared), headroom, but=entry):
            if self.slots.used or not self.make_room(pages):  # alone it needs no more than there is, without the entry
                return False
            entry, shared = None, ()
        own = pages - len(shared)
        (request.slot,) = self.slots.take(1)
        self.pages.share(shared)
        request.pages = [*shared, *self.pages.take(own)]
        request.window_pages = self.window_pages.take(window)
        if request.kept is not None:
            self._restore(request, request.kept)
            self.host.give(request.kept)
            request.kept = None
        elif entry is not None:
            self._start_from(request, entry)
        else:
            request.held = request.start
        self._count_query(request, entry)
        return True

    def make_room(self, pages: int, spare: int = 0, *, but: Entry | None = None) -> bool:
        """Whether this many pages are free; prefixes, except `but`, are evicted if that makes enough room, with `spare`
        more that are free or could be."""
        if pages + spare <= self.pages.free:
            return True
        if self.prefixes is None:
            return False
        lacking = pages + spare - self.pages.free
        if pages + spare > 1 and lacking > self._evictable(but, lacking):
            return False
        while pages > self.pages.free and self.evict(but):
            pass
        return pages <= self.pages.free

    def grow(self, request: Request, pages: int) -> None:
        request.pages += self.pages.take(pages)

    def release(self, request: Request) -> None:
        """Free everything that a request has."""
        if request.slot >= 0:
            self.slots.give([request.slot])
            self.pages.give(request.pages)
            self.window_pages.give(request.window_pages)
        if request.kept is not None:
            self.host.give(request.kept)
        if self.prefixes is not None:
            self.prefixes.release(request)
        request.slot, request.pages, request.window_pages, request.kept = -1, [], [], None
        request.prepared = False

    def preempt(self, request: Request) -> None:
        """Take slot and pages away; the states move to the host if there is room, and are computed again otherwise."""
        self.counts.preemptions += 1
        request.preemptions += 1
        at, size = None, self.capacity.state_bytes(request.held)
        if request.held > request.start:
            at = self._host_room(size)
            if at is not None and not self.copies.slot_to_host(request, at):
                self.host.give(at)
                at = None
        self.release(request)
        if at is None:
            request.restart(replay=self.capacity.whole_chunks)
        else:
            request.kept = at
            self.counts.bytes_out += size

    def keep(self, request: Request, tokens: Sequence[int]) -> None:
        """Cache the states of a running request, which holds `tokens`."""
        c, prefixes, end = self.capacity, self.prefixes, len(tokens)
        assert prefixes is not None and end == request.held
        key = prefixes.key(tokens, page_hashes(tokens, c.page_size, request.hashes))
        parent, request.entry = request.entry, key
        if key in prefixes.entries:
            prefixes.entries.move_to_end(key)
            return
        if not prefixes.rows.free:
            self.evict()
        hits = 0
        if key in prefixes.hosted:
            hits = prefixes.hosted[key].hits
            self._forget(prefixes.hosted[key])
        (row,) = prefixes.rows.take(1)
        self.copies.slot_to_row(request, row)
        pages = tuple(request.pages[: c.pages_for(end)[0]])
        prefixes.add(Entry(key=key, end=end, row=row, pages=pages, parent=parent, hits=hits))

    @property
    def requests_pages(self) -> int:
        """KV pages that requests have; the others are free, or would be if a request needed them."""
        return self.pages.used - self._evictable()

    @property
    def prefix_bytes(self) -> int:
        """States and KV pages of the prefixes on the device."""
        if self.prefixes is None:
            return 0
        c = self.capacity
        return len(self.prefixes.entries) * c.row_bytes + len(self.prefixes.held) * c.page_bytes

    def worth_keeping(self, end: int) -> bool:
        """Whether another prompt can start from the states after `end` tokens, and save something."""
        return self.prefixes is not None and SHORTEST <= end <= self.capacity.max_seq_len - 2

    def evict(self, but: Entry | None = None) -> bool:
        """Move the least recently used entry on the device, other than `but`, to the host. False if there is none."""
        prefixes = self.prefixes
        entry = next((e for e in prefixes.entries.values() if e is not but), None) if prefixes else None
        if prefixes is None or entry is None:
            return False
        self.counts.evictions += 1
        size = self.capacity.state_bytes(entry.end)
        wanted = not entry.superseded and self.evicted_bytes + size <= LARGEST
        at = self._host_room(size, but) if wanted else None
        if at is not None and not self.copies.row_to_host(entry, at):
            self.host.give(at)
            at = None
        prefixes.remove(entry)
        if at is not None:
            self.evicted_bytes += size
            self.counts.bytes_out += size
            prefixes.add(replace(entry, row=-1, pages=(), at=at))
        return True

    def _evictable(self, but: Entry | None = None, most: int | None = None) -> int:
        """Pages that only prefixes have, without those of `but`; counted up to `most`, as there may be thousands."""
        if self.prefixes is None:
            return 0
        kept, holders = set(but.pages) if but else set(), self.pages.holders
        found = (p for p, n in self.prefixes.held.items() if n == holders[p] and p not in kept)
        return sum(1 for _ in islice(found, most))

    def _find(self, request: Request) -> Entry | None:
        if self.prefixes is None or request.text is None or request.kept is not None:
            return None
        most = request.prompt_len - (request.generated == 0)  # the logits of the last token are not cached
        return self.prefixes.find(request.text, request.hashes, most)

    def _shared(self, entry: Entry | None) -> tuple[int, ...]:
        """The pages of an entry that a request that starts from it shares: the whole ones."""
        return entry.pages[: entry.end // self.capacity.page_size] if entry is not None and entry.at is None else ()

    def _start_from(self, request: Request, entry: Entry) -> None:
        assert self.prefixes is not None and request.text is not None
        request.held = entry.end
        self.prefixes.use(entry)
        if entry.at is None:
            request.entry = entry.key
            partial = entry.end % self.capacity.page_size
            self.copies.row_to_slot(entry.row, request, entry.pages[-1] if partial else None)
            request.restored = True
        else:
            request.entry = entry.parent
            self._restore(request, entry.at)
            self.keep(request, request.text[: entry.end])

    def _restore(self, request: Request, at: int) -> None:
        self.copies.host_to_slot(at, request)
        self.counts.bytes_in += self.capacity.state_bytes(request.held)
        request.restored = True

    def _count_query(self, request: Request, entry: Entry | None) -> None:
        if request.cached_tokens is not None or self.prefixes is None or request.text is None:
            return
        request.cached_tokens = entry.end if entry else 0
        branch = self.prefixes.remember(request)
        if branch > request.held and self.worth_keeping(branch) and not self.capacity.whole_chunks:
            self.prefixes.claim(request, branch)
        self.counts.queries += self.worth_keeping(request.prompt_len - 1)
        if entry is not None:
            self.counts.hit_tokens += entry.end
            self.counts.hits += entry.at is None
            self.counts.host_hits += entry.at is not None

    def _host_room(self, size: int, but: Entry | None = None) -> int | None:
        """First byte of `size` free bytes on the host; prefixes there are forgotten for it."""
        if not 0 < size <= min(LARGEST, self.host.size):
            return None
        while (at := self.host.take(size)) is None:
            hosted = self.prefixes.hosted.values() if self.prefixes else ()
            entry = next((e for e in hosted if e is not but), None)
            if entry is None:
                return None
            self._forget(entry)
        return at

    def _forget(self, entry: Entry) -> None:
        assert self.prefixes is not None and entry.at is not None
        self.prefixes.remove(entry)
        self.host.give(entry.at)
