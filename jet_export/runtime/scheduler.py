"""The scheduler: which requests each step runs, and when they get slots and pages. Plain Python, no tensors.

Requests wait in one queue: by priority, the lower first, and first come first served among equals. A request is
admitted once a slot and the pages of its prompt are free, and takes further pages as its tokens need them. When none is
left, even after evicting cached prefixes (memory.py), the last of the running requests is preempted, in the same order:
it gives up slot and pages, goes back to the queue, and continues later from its states or from its tokens. Requests of
one priority never overtake each other. The first of those that run is never preempted and advances in every step, so
each request ends, unless others that go before it never cease to arrive. A step decodes one token for each sequence
whose prompt has been prefilled, and spends the rest of the token budget on prompt chunks, in the same order (a mixed
step).

    plan() -> launch the step -> advance(plan) -> finish() the requests that its tokens end, or cancels, at any time

The next step may be planned once this one is launched (overlap scheduling): advance() counts what is launched. A
request whose last token has been launched is in no plan any more, and owns its slot until finish(). A preempted request
is admitted by a later plan at the earliest: all its tokens are known then.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from itertools import takewhile

from jet_export.runtime.memory import Copies, Memory
from jet_export.runtime.pacing import Pacing
from jet_export.runtime.plan import Capacity, Plan, Request, Status
from jet_export.utils.errors import JetExportError

AHEAD = 4  # pages a sequence takes at once while there are plenty: each time, the device's block tables change


class QueueFull(JetExportError):
    """The waiting queue is at its limit; try again later."""


class Scheduler:
    """Not thread-safe: the caller holds a lock. Times are seconds on the caller's clock."""

    def __init__(self, capacity: Capacity, copies: Copies, pacing: Pacing | None = None) -> None:
        self.capacity, self.pacing = capacity, pacing
        self.memory = Memory(capacity, copies)
        self.slots, self.pages, self.window_pages = self.memory.slots, self.memory.pages, self.memory.window_pages
        self.prefixes = self.memory.prefixes
        self.waiting: deque[Request] = deque()  # by rank, as `running` is
        self.running: list[Request] = []
        self.submitted = 0
        self.blocked: tuple[Request, int] | None = None  # did not fit when so many pages had been given back

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
        if request.leads and self.memory.worth_keeping(request.prompt_len - 1):
            request.fork_at = request.prompt_len - 1  # the last token always runs, for its logits
        if self.unstarted >= self.capacity.max_waiting + self.memory.slots.free:
            raise QueueFull(f"{self.capacity.max_waiting} requests are waiting already.", "Try again later.")
        self.submitted += 1
        request.rank = request.priority, self.submitted
        self._queue(request)
        return request

    def _queue(self, request: Request) -> None:
        """Among the waiting ones, by rank: nearly always at an end."""
        if not self.waiting or request.rank > self.waiting[-1].rank:
            self.waiting.append(request)
        elif request.rank < self.waiting[0].rank:
            self.waiting.appendleft(request)
        else:
            insort(self.waiting, request, key=_rank)

    @property
    def unstarted(self) -> int:
        """Requests that have never run."""
        return sum(not r.preemptions for r in self.waiting)

    def expire(self, now: float) -> list[Request]:
        """End the requests that have waited longer than the timeout to start, and return them."""

        def waited(r: Request) -> bool:
            return bool(r.preemptions) or now - r.arrival > self.capacity.wait_timeout

        if not self.waiting:
            return []
        by_arrival = self.waiting[0].priority == self.waiting[-1].priority
        late = [r for r in (takewhile if by_arrival else filter)(waited, self.waiting) if not r.preemptions]
        for request in late:
            self.finish(request)
        return late

    def plan(self) -> Plan:
        """The next step; empty if nothing runs."""
        self.memory.evicted_bytes = 0
        running, page = self.running, self.capacity.page_size
        full = [r for r in running if r.held >= len(r.pages) * page]
        grown, preempted = self._grow([r for r in full if r.generated and not r.launched and not r.in_prompt])
        if not preempted:
            self._admit()
        # Attributes, not the properties in_prompt and launched: these two lists are most of a plan's time.
        ready = [r for r in running if r.held >= r.prefill_len and r.generated < r.max_new_tokens]
        decode = [r for r in ready if r.generated]
        resumed = tuple(r for r in ready if not r.generated) if len(decode) < len(ready) else ()
        if full:
            decode = [r for r in decode if r.held < len(r.pages) * page]
        prefill = self._prompts(len(decode)) if len(ready) < len(running) else ()
        return Plan(prefill, tuple(decode), resumed, grown)

    def _prompts(self, decoding: int) -> tuple[tuple[Request, int, int], ...]:
        """The prompt chunks of a step in which so many sequences decode."""
        prefill, budget = [], self.prompt_tokens(decoding)
        for request in self.running:
            if request.in_prompt and budget:
                n = self._chunk(request, budget)
                if n == 0:  # no room for a whole chunk: the prompts behind it wait too
                    break
                prefill.append((request, request.held, n))
                budget -= n
        return tuple(prefill)

    def advance(self, plan: Plan) -> list[Request]:
        """`plan` is launched. Returns the requests it samples a token for, without those cancelled in the meantime."""
        sampled, running = [], Status.RUNNING
        for request, _, n in plan.prefill:
            if request.status is running:
                request.held += n
                # The prefill of a request that has been preempted ends at a token that was sampled before.
                if not request.in_prompt and not request.generated:
                    sampled.append(request)
        sampled += [r for r in plan.resumed if r.status is running]
        for request in plan.decode:
            if request.status is running:
                request.held += 1
                sampled.append(request)
        for request in sampled:
            request.generated += 1
        return sampled

    def take(self, request: Request, n: int) -> None:
        """A running request has n more tokens of the step that is launched: its draft was right so far."""
        request.held += n
        request.generated += n

    def prefix_due(self, request: Request) -> bool:
        """Whether the states of a request should be cached as they are now, its prompt having advanced."""
        c = self.capacity
        if request.status is not Status.RUNNING or request.text is None or request.held > request.prompt_len:
            return False
        at_end = request.held == request.prompt_len and not c.whole_chunks  # a chunk of its own has other bits
        stops = request.branch, request.fork_at
        inside = c.prefix_interval and (request.held % c.prefix_interval == 0 or request.held in stops)
        return bool(at_end or inside) and self.memory.worth_keeping(request.held)

    def turn_due(self, request: Request) -> bool:
        """The same at the end of a request: then its answer is part of the prefix."""
        running = request.status is Status.RUNNING and request.text is not None
        return running and not self.capacity.whole_chunks and self.memory.worth_keeping(request.held)

    def keep_prefix(self, request: Request, tokens: Sequence[int]) -> None:
        """Cache the states of a running request, which holds `tokens`."""
        self.memory.keep(request, tokens)

    def finish(self, request: Request) -> None:
        """End a waiting or running request and free what it has. Does nothing if it has ended already."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        elif request.status is Status.RUNNING:
            self.running.remove(request)
        self.memory.release(request)
        request.status = Status.ENDED

    def prompt_tokens(self, decoding: int) -> int:
        """The most prompt tokens of a step in which so many sequences decode."""
        budget = self.capacity.token_budget - decoding
        beside = self.pacing.prompt_tokens(decoding) if self.pacing else self.capacity.mixed_prefill
        return budget if beside is None or not decoding else min(budget, beside)

    def _chunk(self, request: Request, budget: int) -> int:
        """Length of the request's next prompt chunk; 0 if a whole chunk does not fit the budget."""
        c = self.capacity
        n = c.prefill_chunk
        if c.whole_chunks or c.prefix_interval:
            n -= request.held % n
        stops = request.branch, 0 if c.whole_chunks else request.fork_at, request.prefill_len
        n = min(n, min(stop for stop in stops if stop > request.held) - request.held)
        if n <= budget:
            return n
        return 0 if c.whole_chunks else budget

    def _grow(self, lacking: list[Request]) -> tuple[tuple[tuple[Request, int], ...], bool]:
        """Give requests that decode the page they lack, the first first: (request, pages); whether any is preempted.

        One stays without a page for this step if none behind it can be preempted and a request is about to end.
        """
        grown, preempted = [], False
        for request in lacking:
            while request.status is Status.RUNNING:
                if self.memory.make_room(1):
                    most = self.capacity.pages_for(request.max_held)[0] - len(request.pages)
                    pages = max(1, min(AHEAD, most, self.memory.pages.free // (4 * len(self.running))))
                    self.memory.grow(request, pages)
                    grown.append((request, pages))
                    break
                last = next(r for r in reversed(self.running) if not r.launched)
                if last is request and any(r.launched for r in self.running):
                    break
                self._preempt(last)
                preempted = True
        return tuple((r, n) for r, n in grown if r.status is Status.RUNNING), preempted

    def _preempt(self, request: Request) -> None:
        assert self.running[0] is not request
        self.memory.preempt(request)
        self.running.remove(request)
        self._queue(request)
        request.status = Status.WAITING

    def _admit(self) -> None:
        page = self.capacity.page_size
        while self.waiting and self.memory.slots.free:
            request = self.waiting[0]
            if request.awaits_leader or self.blocked == (request, self.pages.given):
                return
            growing = len(self.running)  # each a page, before it is preempted; counted only where that may matter
            if self.pages.free < growing + request.length // page + 1:
                growing = sum(r.max_held > len(r.pages) * page for r in self.running)
            if not self.memory.admit(request, growing):
                self.blocked = request, self.pages.given
                return
            self.waiting.popleft()
            request.status = Status.RUNNING
            insort(self.running, request, key=_rank)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
