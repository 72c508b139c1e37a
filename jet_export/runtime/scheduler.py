"""Which request runs when, and which memory it owns: plain Python, no tensors.

A request waits in one queue, first come first served, until a slot and every page that it may come to need are free;
from then on nothing can take them away, so a running request always ends. A step is decode for every sequence that has
its prompt behind it, one token each, and what is left of the token budget goes to prompts in order of admission, in
chunks. Nobody overtakes: the first in the queue runs once those before it have ended, which max_new_tokens bounds.
Pages that only the prefix cache holds (prefix.py) count as free: entries go when a request needs them.

    plan() -> run it -> advance(plan) -> finish() each request that has ended; cancel() at any moment.
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
    """What there is to give out. Tokens unless said otherwise."""

    slots: int  # sequences at once
    pages: int  # KV pages of full-attention layers
    window_pages: int  # KV pages of sliding-window layers
    page_size: int
    ring_pages: int  # pages after which a window's ring begins again
    max_seq_len: int
    prefill_chunk: int  # most of one prompt a step
    token_budget: int  # most of all sequences a step, decode and prefill
    max_waiting: int  # requests in the queue
    wait_timeout: float  # seconds in the queue
    whole_chunks: bool = False  # a prompt's chunks end at multiples of prefill_chunk, whoever else runs
    prefix_interval: int = 0  # tokens between entries of the prefix cache; 0: no cache
    prefix_bytes: int = 0  # most that the prefix cache holds
    page_bytes: int = 0  # of a KV page in all full-attention layers

    def __post_init__(self) -> None:
        for name in ("slots", "page_size", "ring_pages", "max_seq_len", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise JetExportError(f"{name} is {getattr(self, name)}.", "It must be at least 1.")
        if self.token_budget < self.slots:  # otherwise decode could leave a prompt nothing for ever
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
        if self.max_waiting < 0 or not self.wait_timeout > 0:
            raise JetExportError("The queue needs max_waiting >= 0 and wait_timeout > 0.")

    def pages_for(self, tokens: int) -> tuple[int, int]:
        """(pages, window pages) that a sequence of `tokens` needs."""
        pages = -(-tokens // self.page_size)
        return pages, min(pages, self.ring_pages)


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Request:
    """One sequence. It holds `held` tokens: those of its prompt first, then all that it made but the last.

    It may begin with `start` tokens of its prompt held (a session's), and with one token made that was never fed.
    """

    prompt_len: int
    max_new_tokens: int
    arrival: float  # seconds, of the caller's clock
    start: int = 0
    keys: tuple[bytes, ...] = ()  # of its prompt's prefixes
    entry: Entry | None = None  # of the prefix cache, that it begins from
    status: Status = Status.WAITING
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    window_pages: list[int] = field(default_factory=list)
    held: int = 0
    made: int = 0

    @property
    def most_held(self) -> int:
        """The last token made is given out and never fed back."""
        return self.prompt_len + self.max_new_tokens - 1

    @property
    def in_prompt(self) -> bool:
        return self.held < self.prompt_len


@dataclass(frozen=True)
class Plan:
    """One step: chunks of prompts, [request, first token, tokens], and the requests that decode one token each.

    `drawn` began with their whole prompt held: their first token comes from the logits that were kept with it.
    """

    prefill: tuple[tuple[Request, int, int], ...]
    decode: tuple[Request, ...]
    drawn: tuple[Request, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.prefill or self.decode or self.drawn)

    @property
    def tokens(self) -> int:
        return len(self.decode) + sum(n for _, _, n in self.prefill)


class Scheduler:
    """See the module. Not thread-safe: the caller holds a lock. Times are of one clock, in seconds."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.slots = Pool(capacity.slots)
        self.pages = Pool(capacity.pages)
        self.window_pages = Pool(capacity.window_pages)
        c = capacity
        self.prefixes = (
            PrefixCache(self.pages, c.prefix_interval, c.page_bytes, c.prefix_bytes) if c.prefix_interval else None
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission

    def check(self, prompt_len: int, max_new_tokens: int) -> None:
        """Raises JetExportError where such a request could never run."""
        c = self.capacity
        if prompt_len < 1:
            raise JetExportError("The prompt is empty.", "Give at least one token.")
        if max_new_tokens < 1:
            raise JetExportError(f"max_new_tokens is {max_new_tokens}.", "Ask for at least 1.")
        if prompt_len + max_new_tokens > c.max_seq_len:
            raise JetExportError(
                f"{prompt_len} prompt tokens and {max_new_tokens} new ones exceed max_seq_len {c.max_seq_len}.",
                "Shorten the prompt or ask for fewer tokens.",
            )
        pages, window = c.pages_for(prompt_len + max_new_tokens - 1)
        if pages > c.pages or window > c.window_pages:
            raise JetExportError(
                f"{prompt_len} prompt tokens and {max_new_tokens} new ones need {pages} KV pages of {c.page_size} "
                f"({window} for windows); there are {c.pages} ({c.window_pages}).",
                "Shorten the prompt, ask for fewer tokens, or give the server more KV memory.",
            )

    def submit(
        self,
        prompt_len: int,
        max_new_tokens: int,
        now: float,
        keys: tuple[bytes, ...] = (),
        start: int = 0,
        made: int = 0,
    ) -> Request:
        """Queue a request. Raises QueueFull, and JetExportError where it could never run.

        `keys`: see prefix.py. `start` tokens of the prompt are held from the beginning; `made` 1: and one more token,
        counted in `max_new_tokens`, has been made after a prompt that is held in full.
        """
        self.check(prompt_len, max_new_tokens)
        assert 0 <= start <= prompt_len and made in (0, 1) and (start == prompt_len or not made)
        request = Request(prompt_len, max_new_tokens, now, start, keys, made=made)
        self.waiting.append(request)
        self._admit()
        if len(self.waiting) > self.capacity.max_waiting:  # it is the last of them: nobody overtakes
            self.waiting.pop()
            request.status = Status.ENDED
            raise QueueFull(f"{self.capacity.max_waiting} requests are waiting already.", "Try again later.")
        return request

    def expire(self, now: float) -> list[Request]:
        """End the requests that have waited too long, and return them."""
        late = [r for r in self.waiting if now - r.arrival > self.capacity.wait_timeout]
        for request in late:
            self.finish(request)
        return late

    def plan(self) -> Plan:
        """The next step; empty where nothing runs."""
        self._admit()
        ready = [r for r in self.running if not r.in_prompt]
        decode = tuple(r for r in ready if r.made)
        budget = self.capacity.token_budget - len(decode)
        prefill = []
        for request in self.running:
            if request.in_prompt and budget:
                n = self._chunk(request, budget)
                if n == 0:  # a whole chunk, and no room for it: those behind it wait too
                    break
                prefill.append((request, request.held, n))
                budget -= n
        return Plan(tuple(prefill), decode, tuple(r for r in ready if not r.made))

    def plan_ahead(self, plan: Plan) -> Plan:
        """The decode step after `plan`, which is still running: of its requests that another token is sure to be asked
        of, unless that step ends them. Empty where prompts are to be fed first."""
        decoding = set(plan.decode)
        if plan.prefill or plan.drawn or any(r not in decoding for r in self.running):
            return Plan((), ())
        more = (r for r in plan.decode if r.status is Status.RUNNING and r.made + 1 < r.max_new_tokens)
        return Plan((), tuple(more))

    def _chunk(self, request: Request, budget: int) -> int:
        """How many tokens of its prompt a request is fed next."""
        c = self.capacity
        n = c.prefill_chunk
        if c.whole_chunks or c.prefix_interval:
            n -= request.held % n
        n = min(n, request.prompt_len - request.held)
        return n if n <= budget else 0 if c.whole_chunks else budget

    def advance(self, plan: Plan) -> list[Request]:
        """`plan` has run. Returns the requests that made a token by it; those cancelled meanwhile are left out."""
        made = []
        fed = [*plan.prefill, *((r, 0, 0) for r in plan.drawn), *((r, 0, 1) for r in plan.decode)]
        for request, _, n in fed:
            if request.status is Status.RUNNING:
                request.held += n
                if not request.in_prompt:
                    request.made += 1
                    made.append(request)
        return made

    def prefix_due(self, request: Request) -> bool:
        """Whether the states as they are now should be kept for other prompts that begin so."""
        if self.prefixes is None or request.status is not Status.RUNNING or not request.keys:
            return False
        index, rest = divmod(request.held, self.capacity.prefix_interval)
        whole = index > 0 and rest == 0 and request.held <= request.prompt_len
        return whole and request.keys[index - 1] not in self.prefixes.entries

    def keep_prefix(self, request: Request, snapshot: Any, size: int) -> None:
        """Put what `prefix_due` asked for into the cache; `size` in bytes."""
        assert self.prefixes is not None
        key = request.keys[request.held // self.capacity.prefix_interval - 1]
        pages = tuple(request.pages[: request.held // self.capacity.page_size])
        self.prefixes.add(Entry(key, request.held, pages, snapshot, size))

    def finish(self, request: Request) -> None:
        """End a request, waiting or running, and free at once all that it owns. Nothing happens the second time."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self.running.remove(request)
            self.slots.give([request.slot])
            self.pages.give(request.pages)
            self.window_pages.give(request.window_pages)
            request.slot, request.pages, request.window_pages, request.entry = -1, [], [], None
        request.status = Status.ENDED

    cancel = finish

    def _admit(self) -> None:
        while self.waiting and self.slots.free:
            request = self.waiting[0]
            pages, window = self.capacity.pages_for(request.most_held)
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
        """Whether so many pages are free, entries of the prefix cache evicted where that is enough."""
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
