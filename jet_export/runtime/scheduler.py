"""Which request runs when, and which memory it owns: plain Python, no tensors.

A request waits in one queue, first come first served, until a slot and every page that it may come to need are free;
from then on nothing can take them away, so a running request always ends. A step is decode for every sequence that has
its prompt behind it, one token each, and what is left of the token budget goes to prompts in order of admission, in
chunks. Nobody overtakes: the first in the queue runs once those before it have ended, which max_new_tokens bounds.

    plan() -> run it -> advance(plan) -> finish() each request that has ended; cancel() at any moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from jet_export.errors import JetExportError


class QueueFull(JetExportError):
    """The waiting queue is at its limit; try again later."""


@dataclass(frozen=True)
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

    def __post_init__(self) -> None:
        for name in ("slots", "page_size", "ring_pages", "max_seq_len", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise JetExportError(f"{name} is {getattr(self, name)}.", "It must be at least 1.")
        if self.token_budget < self.slots:  # otherwise decode could leave a prompt nothing for ever
            raise JetExportError(
                f"token_budget {self.token_budget} is less than the {self.slots} sequences that run at once.",
                f"Set it to {self.slots} or more.",
            )
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
    """One sequence. It holds `held` tokens: those of its prompt first, then all that it made but the last."""

    prompt_len: int
    max_new_tokens: int
    arrival: float  # seconds, of the caller's clock
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
    """One step: chunks of prompts, [request, first token, tokens], and the requests that decode one token each."""

    prefill: tuple[tuple[Request, int, int], ...]
    decode: tuple[Request, ...]

    @property
    def tokens(self) -> int:
        return len(self.decode) + sum(n for _, _, n in self.prefill)


class Pool:
    """Numbered things, each free or owned."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))  # the lowest number last: it is taken first

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.size - self.free

    def take(self, n: int) -> list[int]:
        assert n <= self.free
        return [self._free.pop() for _ in range(n)]

    def give(self, items: Iterable[int]) -> None:
        self._free.extend(items)


class Scheduler:
    """See the module. Not thread-safe: the caller holds a lock. Times are of one clock, in seconds."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.slots = Pool(capacity.slots)
        self.pages = Pool(capacity.pages)
        self.window_pages = Pool(capacity.window_pages)
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

    def submit(self, prompt_len: int, max_new_tokens: int, now: float) -> Request:
        """Queue a request. Raises QueueFull, and JetExportError where it could never run."""
        self.check(prompt_len, max_new_tokens)
        request = Request(prompt_len, max_new_tokens, now)
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
        decode = tuple(r for r in self.running if not r.in_prompt)
        budget = self.capacity.token_budget - len(decode)
        prefill = []
        for request in self.running:
            if request.in_prompt and budget:
                n = min(self.capacity.prefill_chunk, request.prompt_len - request.held, budget)
                prefill.append((request, request.held, n))
                budget -= n
        return Plan(tuple(prefill), decode)

    def advance(self, plan: Plan) -> list[Request]:
        """`plan` has run. Returns the requests that made a token by it; those cancelled meanwhile are left out."""
        made = []
        for request, _, n in [*plan.prefill, *((r, 0, 1) for r in plan.decode)]:
            if request.status is Status.RUNNING:
                request.held += n
                if not request.in_prompt:
                    request.made += 1
                    made.append(request)
        return made

    def finish(self, request: Request) -> None:
        """End a request, waiting or running, and free at once all that it owns. Nothing happens the second time."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self.running.remove(request)
            self.slots.give([request.slot])
            self.pages.give(request.pages)
            self.window_pages.give(request.window_pages)
            request.slot, request.pages, request.window_pages = -1, [], []
        request.status = Status.ENDED

    cancel = finish

    def _admit(self) -> None:
        while self.waiting and self.slots.free:
            request = self.waiting[0]
            pages, window = self.capacity.pages_for(request.most_held)
            if pages > self.pages.free or window > self.window_pages.free:
                return
            self.waiting.popleft()
            (request.slot,) = self.slots.take(1)
            request.pages, request.window_pages = self.pages.take(pages), self.window_pages.take(window)
            request.status = Status.RUNNING
            self.running.append(request)
