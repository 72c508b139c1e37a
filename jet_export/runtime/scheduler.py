"""The scheduler: which requests each step runs, and which slot and pages they own. Plain Python, no tensors.

Requests wait in one queue, first come first served. A request is admitted once a slot and all the pages it may ever
need are free; it keeps them until it ends, so there is no preemption and every running request finishes. A step decodes
one token for each sequence whose prompt has been prefilled, and spends the rest of the token budget on prompt chunks,
in order of admission (a mixed step). Requests never overtake each other, so none starves: max_new_tokens bounds how
long the requests before it run. Pages that only the prefix cache (prefix.py) holds are evicted when a request
needs them.

    plan() -> launch the step -> advance(plan) -> finish() the requests that its tokens end, or cancels, at any time

The next step may be planned once this one is launched (overlap scheduling): advance() counts what is launched. A
request whose last token has been launched is in no plan any more, and owns its slot until finish().
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from jet_export.runtime.prefix import Entry, Pool, PrefixCache
from jet_export.utils.errors import JetExportError


class QueueFull(JetExportError):
    """The waiting queue is at its limit; try again later."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The resources that requests share. Lengths are in tokens."""

    slots: int  # sequences at once
    pages: int  # KV pages of full-attention layers
    window_pages: int  # KV pages of sliding-window layers
    page_size: int
    ring_pages: int  # pages in the ring of one sequence's sliding windows
    max_seq_len: int
    prefill_chunk: int  # at most this much of one prompt per step
    token_budget: int  # per step: decode and prefill of all sequences
    max_waiting: int  # requests in the queue
    wait_timeout: float  # seconds in the queue
    whole_chunks: bool = False  # a prompt's chunks end at multiples of prefill_chunk, whatever else runs
    prefix_interval: int = 0  # tokens between entries of the prefix cache; 0: no cache
    prefix_bytes: int = 0  # size limit of the prefix cache
    page_bytes: int = 0  # of one KV page, over all full-attention layers
    mixed_prefill: int | None = None  # prompt tokens of a step that also decodes; None: what the budget leaves

    def __post_init__(self) -> None:
        for name in ("slots", "page_size", "ring_pages", "max_seq_len", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise JetExportError(f"{name} is {getattr(self, name)}.", "It must be at least 1.")
        if self.token_budget < self.slots:  # otherwise decode could starve a prompt
            raise JetExportError(
                f"token_budget {self.token_budget} is less than the {self.slots} sequences that run at once.",
                f"Set it to {self.slots} or more.",
            )
        if self.whole_chunks and self.token_budget < self.slots - 1 + self.prefill_chunk:
            raise JetExportError(
                f"token_budget {self.token_budget} has no room for a chunk of {self.prefill_chunk} tokens beside "
                f"{self.slots - 1} sequences.",
                f"Set it to {self.slots - 1 + self.prefill_chunk} or more.",
            )
        if self.prefix_interval % self.page_size or self.prefix_interval % self.prefill_chunk:
            raise JetExportError(f"prefix_interval {self.prefix_interval} is not a whole number of pages and chunks.")
        if self.mixed_prefill is not None and (self.whole_chunks or self.mixed_prefill < 1):
            raise JetExportError(
                f"mixed_prefill is {self.mixed_prefill}.", "It must be at least 1, and goes without whole chunks."
            )
        if self.max_waiting < 0 or not self.wait_timeout > 0:
            raise JetExportError("The queue needs max_waiting >= 0 and wait_timeout > 0.")

    def pages_for(self, tokens: int) -> tuple[int, int]:
        """(pages, window pages) of a sequence of this length."""
        pages = -(-tokens // self.page_size)
        return pages, min(pages, self.ring_pages)


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False, kw_only=True)
class Request:
    """A request as the scheduler sees it: lengths, and the slot and pages it owns while it runs.

    `held` tokens are in its states: those of the prompt first, then all generated ones but the last. A session's
    request has `start` prompt tokens held at admission; `generated` is 1 where the token after a fully held prompt
    has been sampled but not yet decoded.
    """

    prompt_len: int
    max_new_tokens: int
    arrival: float  # seconds, on the caller's clock
    start: int = 0
    keys: tuple[bytes, ...] = ()  # of its prompt's prefixes, see prefix.py
    generated: int = 0
    entry: Entry | None = None  # the prefix cache entry it starts from
    status: Status = Status.WAITING
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    window_pages: list[int] = field(default_factory=list)
    held: int = 0

    @property
    def max_held(self) -> int:
        """The last generated token is returned but never fed back."""
        return self.prompt_len + self.max_new_tokens - 1

    @property
    def in_prompt(self) -> bool:
        return self.held < self.prompt_len


@dataclass(frozen=True)
class Plan:
    """One step: prompt chunks as (request, first token, number of tokens), and the requests that decode one token.

    `resumed` requests start with the whole prompt held; their first token is sampled from the logits saved with it.
    """

    prefill: tuple[tuple[Request, int, int], ...] = ()
    decode: tuple[Request, ...] = ()
    resumed: tuple[Request, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.prefill or self.decode or self.resumed)

    @property
    def prefill_tokens(self) -> int:
        return sum(n for _, _, n in self.prefill)

    @property
    def tokens(self) -> int:
        return len(self.decode) + self.prefill_tokens


class Scheduler:
    """Not thread-safe: the caller holds a lock. Times are seconds on the caller's clock."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.slots = Pool(capacity.slots)
        self.pages = Pool(capacity.pages)
        self.window_pages = Pool(capacity.window_pages)
        c = capacity
        self.prefixes: PrefixCache | None = None
        if c.prefix_interval:
            self.prefixes = PrefixCache(
                self.pages, interval=c.prefix_interval, page_bytes=c.page_bytes, max_bytes=c.prefix_bytes
            )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission

    def check(self, request: Request) -> None:
        """Raises JetExportError if the request could never run."""
        c, prompt_len, max_new_tokens = self.capacity, request.prompt_len, request.max_new_tokens
        if prompt_len < 1:
            raise JetExportError("The prompt is empty.", "Give at least one token.")
        if max_new_tokens < 1:
            raise JetExportError(f"max_new_tokens is {max_new_tokens}.", "Ask for at least 1.")
        if prompt_len + max_new_tokens > c.max_seq_len:
            raise JetExportError(
                f"{prompt_len} prompt tokens and {max_new_tokens} new ones exceed max_seq_len {c.max_seq_len}.",
                "Shorten the prompt or ask for fewer tokens.",
            )
        pages, window = c.pages_for(request.max_held)
        if pages > c.pages or window > c.window_pages:
            raise JetExportError(
                f"{prompt_len} prompt tokens and {max_new_tokens} new ones need {pages} KV pages of {c.page_size} "
                f"({window} for windows); there are {c.pages} ({c.window_pages}).",
                "Shorten the prompt, ask for fewer tokens, or give the server more KV memory.",
            )

    def submit(self, request: Request) -> Request:
        """Queue a request and return it. Raises QueueFull, and JetExportError if it could never run."""
        self.check(request)
        assert 0 <= request.start <= request.prompt_len
        assert request.generated == 0 or (request.generated == 1 and request.start == request.prompt_len)
        self.waiting.append(request)
        self._admit()
        if len(self.waiting) > self.capacity.max_waiting:  # then this request is still the last in the queue
            self.waiting.pop()
            request.status = Status.ENDED
            raise QueueFull(f"{self.capacity.max_waiting} requests are waiting already.", "Try again later.")
        return request

    def expire(self, now: float) -> list[Request]:
        """End the requests that have waited longer than the timeout, and return them."""
        late = [r for r in self.waiting if now - r.arrival > self.capacity.wait_timeout]
        for request in late:
            self.finish(request)
        return late

    def plan(self) -> Plan:
        """The next step; empty if nothing runs."""
        self._admit()
        ready = [r for r in self.running if not r.in_prompt and r.generated < r.max_new_tokens]
        decode = tuple(r for r in ready if r.generated)
        budget = self.capacity.token_budget - len(decode)
        if decode and self.capacity.mixed_prefill is not None:
            budget = min(budget, self.capacity.mixed_prefill)
        prefill = []
        for request in self.running:
            if request.in_prompt and budget:
                n = self._chunk(request, budget)
                if n == 0:  # no room for a whole chunk: the prompts behind it wait too
                    break
                prefill.append((request, request.held, n))
                budget -= n
        return Plan(tuple(prefill), decode, tuple(r for r in ready if not r.generated))

    def _chunk(self, request: Request, budget: int) -> int:
        """Length of the request's next prompt chunk; 0 if a whole chunk does not fit the budget."""
        c = self.capacity
        n = c.prefill_chunk
        if c.whole_chunks or c.prefix_interval:
            n -= request.held % n
        n = min(n, request.prompt_len - request.held)
        if n <= budget:
            return n
        return 0 if c.whole_chunks else budget

    def advance(self, plan: Plan) -> list[Request]:
        """`plan` is launched. Returns the requests it samples a token for, without those cancelled in the meantime."""
        sampled = []
        fed = [*plan.prefill, *((r, 0, 0) for r in plan.resumed), *((r, 0, 1) for r in plan.decode)]
        for request, _, n in fed:
            if request.status is Status.RUNNING:
                request.held += n
                if not request.in_prompt:
                    request.generated += 1
                    sampled.append(request)
        return sampled

    def prefix_due(self, request: Request) -> bool:
        """Whether the request's current states should be added to the prefix cache."""
        if self.prefixes is None or request.status is not Status.RUNNING or not request.keys:
            return False
        index, rest = divmod(request.held, self.capacity.prefix_interval)
        whole = index > 0 and rest == 0 and request.held <= request.prompt_len
        return whole and request.keys[index - 1] not in self.prefixes.entries

    def keep_prefix(self, request: Request, snapshot: Any, size: int) -> None:
        """Add the states that `prefix_due` asked for to the cache; `size` in bytes."""
        assert self.prefixes is not None
        key = request.keys[request.held // self.capacity.prefix_interval - 1]
        pages = tuple(request.pages[: request.held // self.capacity.page_size])
        self.prefixes.add(Entry(key=key, end=request.held, pages=pages, snapshot=snapshot, size=size))

    def finish(self, request: Request) -> None:
        """End a waiting or running request and free its slot and pages. Does nothing if it has ended already."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self.running.remove(request)
            self.slots.give([request.slot])
            self.pages.give(request.pages)
            self.window_pages.give(request.window_pages)
            request.slot, request.pages, request.window_pages, request.entry = -1, [], [], None
        request.status = Status.ENDED

    def _admit(self) -> None:
        while self.waiting and self.slots.free:
            request = self.waiting[0]
            pages, window = self.capacity.pages_for(request.max_held)
            entry = self.prefixes.find(request.keys, request.prompt_len - 1) if self.prefixes else None
            shared = entry.pages if entry else ()
            if window > self.window_pages.free or not self._make_room(pages - len(shared), entry):
                return
            self.waiting.popleft()
            (request.slot,) = self.slots.take(1)
            self.pages.share(shared)
            request.pages = [*shared, *self.pages.take(pages - len(shared))]
            request.window_pages = self.window_pages.take(window)
            request.entry, request.held = entry, entry.end if entry else request.start
            request.status = Status.RUNNING
            self.running.append(request)

    def _make_room(self, pages: int, keep: Entry | None) -> bool:
        """Whether this many pages are free; evicts prefix cache entries, except `keep`, if that makes enough room."""
        if pages <= self.pages.free:
            return True
        if self.prefixes is None:
            return False
        needed = {p for r in self.running for p in r.pages}.union(keep.pages if keep else ())
        if pages > self.pages.size - len(needed):
            return False
        while pages > self.pages.free and self.prefixes.evict(keep):
            pass
        return pages <= self.pages.free
