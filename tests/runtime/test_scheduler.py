"""Invariants of the scheduler, under any order of arrivals, steps and cancellations."""

import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jet_export.runtime.prefix import Pool, prefix_keys
from jet_export.runtime.scheduler import Capacity, QueueFull, Request, Scheduler, Status
from jet_export.utils.errors import JetExportError


@st.composite
def capacities(draw, cached: bool = False) -> Capacity:
    slots, whole = draw(st.integers(1, 5)), draw(st.booleans())
    page = draw(st.sampled_from([1, 4] if cached else [1, 4, 16]))
    chunk = draw(st.sampled_from([2, 4, 8]) if cached else st.integers(1, 20))
    pages = draw(st.integers(60 // page, 90 // page) if cached else st.integers(1, 24))
    return Capacity(
        slots=slots,
        pages=pages,
        window_pages=draw(st.integers(1, 12)),
        page_size=page,
        ring_pages=draw(st.integers(1, 2 if cached else 6)),
        max_seq_len=pages * page if cached else draw(st.integers(2, 24 * page)),
        prefill_chunk=chunk,
        token_budget=slots + chunk * whole + draw(st.integers(0, 30)),
        max_waiting=draw(st.integers(0, 6)),
        wait_timeout=draw(st.sampled_from([2.0, 50.0])),
        whole_chunks=whole,
        prefix_interval=math.lcm(chunk, page) if cached else 0,
        prefix_bytes=draw(st.sampled_from([200, 10**6])),
        page_bytes=7,
        mixed_prefill=None if whole else draw(st.none() | st.integers(1, 12)),
    )


def fits(c: Capacity, prompt: int, new: int) -> bool:
    pages, window = c.pages_for(prompt + new - 1)
    return prompt + new <= c.max_seq_len and pages <= c.pages and window <= c.window_pages


def submit(scheduler: Scheduler, prompt_len: int, max_new_tokens: int, now: float = 0.0, **options) -> Request:
    request = Request(prompt_len=prompt_len, max_new_tokens=max_new_tokens, arrival=now, **options)
    return scheduler.submit(request)


HITS: list[int] = []  # requests that started from the prefix cache, in each run of the machine


class Life(RuleBasedStateMachine):
    """A scheduler, with a record of the tokens each request was fed and generated, and of each page's contents."""

    @initialize(capacity=capacities())
    def start(self, capacity: Capacity) -> None:
        self.begin(capacity)

    def begin(self, capacity: Capacity) -> None:
        self.c, self.s, self.now = capacity, Scheduler(capacity), 0.0
        self.alive: list[Request] = []
        self.order: list[Request] = []  # accepted requests, by arrival
        self.admitted: list[Request] = []
        self.fed: Counter[Request] = Counter()
        self.text: dict[Request, list[int]] = {}  # its prompt, then numbers unique to it as generated tokens
        self.memory: dict[tuple[int, int], int] = {}  # (page, offset) -> token
        self.hits = 0

    @rule(common=st.integers(0, 50), own=st.integers(1, 9), new=st.integers(1, 9), family=st.integers(0, 1))
    def submit(self, common: int, own: int, new: int, family: int) -> None:
        """A prompt that shares a prefix with others of its family."""
        unique = 100 + 200 * len(self.order)
        text = [family] * common + list(range(unique, unique + own + new))
        interval = self.c.prefix_interval
        keys = prefix_keys(text[: common + own], interval) if interval else ()
        self.accept(text, common + own, new, keys=keys)
        for _ in range(common // 10):  # part of it runs before the next prompt of the family arrives
            self.step()

    @rule(length=st.integers(1, 60), more=st.integers(0, 20), new=st.integers(2, 20), sampled=st.booleans())
    def continue_session(self, length: int, more: int, new: int, sampled: bool) -> None:
        """A session of `length` tokens, continued with a prompt or without."""
        unique = 100 + 200 * len(self.order)
        text = list(range(unique, unique + length + more + new))
        self.accept(text, length + more, new, start=length, generated=int(sampled and not more))

    def accept(self, text: list[int], prompt: int, new: int, **options) -> None:
        full = len(self.s.waiting) >= self.c.max_waiting
        if not fits(self.c, prompt, new):
            with pytest.raises(JetExportError):
                submit(self.s, prompt, new, self.now, **options)
            return
        try:
            request = submit(self.s, prompt, new, self.now, **options)
        except QueueFull:
            assert full
            return
        self.text[request] = text
        self.alive.append(request)
        self.order.append(request)
        self.note_admissions()

    def note_admissions(self) -> None:
        for r in self.s.running:
            if r not in self.admitted:
                self.admitted.append(r)
                self.fed[r] = r.held
                if r.entry is None:  # a session's states are copied in
                    assert r.held == r.start
                    self.write(r, 0, r.start)
                else:
                    self.hits += 1
                    assert r.held == r.entry.end < r.prompt_len
                    assert r.entry.snapshot == self.text[r][: r.held]

    def write(self, r: Request, first: int, n: int) -> None:
        for p in range(first, first + n):
            page = r.pages[p // self.c.page_size]
            assert self.s.pages.holders[page] == 1  # a page that is written to is not shared
            self.memory[page, p % self.c.page_size] = self.text[r][p]

    def read(self, r: Request) -> list[int]:
        return [self.memory[r.pages[p // self.c.page_size], p % self.c.page_size] for p in range(r.held)]

    @rule(times=st.integers(1, 5))
    def step(self, times: int = 1) -> None:
        for _ in range(times):
            plan = self.s.plan()
            self.note_admissions()
            self.check_plan(plan)
            self.run(plan, set())

    @rule()
    def step_with_overlap(self) -> None:
        """The next step is planned and launched before this one's tokens are read; all laws of a plan hold for it."""
        plan = self.s.plan()
        self.note_admissions()
        self.check_plan(plan)
        sampled = self.launch(plan, set())
        overlapped = self.s.plan()
        self.note_admissions()
        self.check_plan(overlapped)
        assert not any(r.generated == r.max_new_tokens for r in (*overlapped.decode, *overlapped.resumed))
        then = self.launch(overlapped, set())
        self.land([r for r in sampled if r not in then])
        self.land(then)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def step_with_a_cancellation_inside(self, data) -> None:
        plan = self.s.plan()
        self.note_admissions()
        victim = data.draw(st.sampled_from(self.alive))
        self.s.finish(victim)
        self.alive.remove(victim)
        self.check_memory()
        self.run(plan, {victim})

    def check_plan(self, plan) -> None:
        assert plan.tokens <= self.c.token_budget
        if plan.decode and self.c.mixed_prefill is not None:
            assert plan.prefill_tokens <= self.c.mixed_prefill
        planned = [r for r, _, _ in plan.prefill] + list(plan.decode) + list(plan.resumed)
        assert len(planned) == len(set(planned))
        assert all(1 <= n <= self.c.prefill_chunk and first == r.held for r, first, n in plan.prefill)
        running = [r for r in self.s.running if r.generated < r.max_new_tokens]  # the others wait for their last token
        assert {*plan.decode, *plan.resumed} == {r for r in running if not r.in_prompt}  # decode never waits
        assert all(r.held == r.prompt_len == r.start and not r.generated for r in plan.resumed)
        assert plan.empty == (not planned)
        if self.c.whole_chunks:
            assert all(
                (first + n) % self.c.prefill_chunk == 0 or first + n == r.prompt_len for r, first, n in plan.prefill
            )
        for r in planned:
            if r in self.s.running:
                assert self.read(r) == self.text[r][: r.held]  # it attends to its own text
        if any(r.in_prompt for r in running):
            assert plan.prefill  # a prompt always makes progress
            assert plan.prefill[0][0] is next(r for r in running if r.in_prompt)
        assert bool(planned) == bool(running)

    def run(self, plan, gone: set[Request]) -> None:
        self.land(self.launch(plan, gone))

    def launch(self, plan, gone: set[Request]) -> list[Request]:
        self.now += 1
        for r, first, n in [*plan.prefill, *((r, r.held, 1) for r in plan.decode)]:
            if r not in gone:
                self.write(r, first, n)
        sampled = self.s.advance(plan)
        for r, _, _ in plan.prefill:
            if self.s.prefix_due(r):
                assert r not in gone and r.held % self.c.prefix_interval == 0
                self.s.keep_prefix(r, self.text[r][: r.held], 50)
        for r, _, n in plan.prefill:
            self.fed[r] += n
        for r in plan.decode:
            self.fed[r] += 1
        expected = {r for r, first, n in plan.prefill if first + n == r.prompt_len} | {*plan.decode, *plan.resumed}
        assert set(sampled) == expected - gone
        for r in sampled:
            assert self.fed[r] == r.held == r.prompt_len + r.generated - 1  # conservation
        return sampled

    def land(self, sampled: list[Request]) -> None:
        for r in sampled:
            if r.generated == r.max_new_tokens:
                self.s.finish(r)
                self.alive.remove(r)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), again=st.booleans())
    def cancel(self, data, again: bool) -> None:
        victim = data.draw(st.sampled_from(self.alive))
        self.s.finish(victim)
        if again:
            self.s.finish(victim)
        self.alive.remove(victim)
        assert victim.slot == -1 and not victim.pages

    @rule(seconds=st.sampled_from([0.5, 3.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        waiting = list(self.s.waiting)
        late = self.s.expire(self.now)
        assert late == [r for r in waiting if self.now - r.arrival > self.c.wait_timeout]
        self.alive = [r for r in self.alive if r not in late]

    @invariant()
    def check_memory(self) -> None:
        if not hasattr(self, "s"):
            return
        s, running = self.s, self.s.running
        entries = list(s.prefixes.entries.values()) if s.prefixes else []
        for pool, owned in (
            (s.slots, [r.slot for r in running]),
            (s.window_pages, [p for r in running for p in r.window_pages]),
        ):
            assert len(owned) == len(set(owned)) == pool.used  # owned once, none leaked
            assert sorted(owned + pool._free) == list(range(pool.size))
        holders = Counter(p for r in running for p in r.pages) + Counter(p for e in entries for p in e.pages)
        assert s.pages.holders == [holders[i] for i in range(s.pages.size)]
        assert sorted([*holders, *s.pages._free]) == list(range(s.pages.size))
        for r in running:
            assert len(r.pages) == len(set(r.pages))
        if s.prefixes:
            assert s.prefixes.size == 50 * len(entries) + 7 * len({p for e in entries for p in e.pages})
            assert s.prefixes.size <= self.c.prefix_bytes
            for e in entries:
                assert e.end % self.c.prefix_interval == 0 and len(e.pages) * self.c.page_size == e.end
        for r in running:
            assert r.held <= r.max_held <= len(r.pages) * self.c.page_size
            assert len(r.window_pages) == min(len(r.pages), self.c.ring_pages)
        assert set(running) | set(s.waiting) == set(self.alive)
        assert len(s.waiting) <= self.c.max_waiting

    @invariant()
    def first_come_first_served(self) -> None:
        if hasattr(self, "s"):
            self.note_admissions()
            assert self.admitted == [r for r in self.order if r in self.admitted]
            left = [r for r in self.order if r.status is Status.WAITING]
            assert list(self.s.waiting) == left

    def teardown(self) -> None:
        HITS.append(getattr(self, "hits", 0))
        self.finish()

    def finish(self) -> None:
        """No starvation: all remaining requests end, within as many steps as they have tokens."""
        if not hasattr(self, "s"):
            return
        work = sum(r.prompt_len + r.max_new_tokens for r in self.alive)
        for _ in range(work):
            if not self.alive:
                break
            self.step()
            self.check_memory()
        assert not self.alive and not self.s.running and not self.s.waiting
        while self.s.prefixes and self.s.prefixes.evict():
            self.check_memory()
        assert self.s.slots.used == self.s.pages.used == self.s.window_pages.used == 0


class SharingLife(Life):
    """With a prefix cache."""

    @initialize(capacity=capacities(cached=True))
    def start(self, capacity: Capacity) -> None:
        self.begin(capacity)


Life.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
SharingLife.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLife, TestSharingLife = Life.TestCase, SharingLife.TestCase


def test_the_machine_had_prefix_hits() -> None:
    assert not HITS or sum(HITS) > 50, HITS


def capacity(**changes) -> Capacity:
    values = {
        "slots": 2,
        "pages": 8,
        "window_pages": 4,
        "page_size": 16,
        "ring_pages": 2,
        "max_seq_len": 128,
        "prefill_chunk": 32,
        "token_budget": 32,
        "max_waiting": 3,
        "wait_timeout": 10.0,
    }
    return Capacity(**{**values, **changes})


def test_a_long_prompt_does_not_hold_up_decoding() -> None:
    s = Scheduler(capacity(token_budget=8))
    short = submit(s, 4, 20)
    s.advance(s.plan())
    long = submit(s, 60, 4)
    while long.in_prompt:
        plan = s.plan()
        assert plan.decode == (short,) and plan.prefill[0][2] <= 7
        s.advance(plan)
    assert short.generated == 1 + 9  # 60 tokens at 7 a step


def test_mixed_prefill_bounds_a_prompt_only_beside_decode() -> None:
    s = Scheduler(capacity(token_budget=32, mixed_prefill=8))
    short = submit(s, 4, 3)
    long = submit(s, 60, 4)
    lengths = []
    while long.in_prompt:
        plan = s.plan()
        lengths.append((len(plan.decode), sum(n for r, _, n in plan.prefill if r is long)))
        s.advance(plan)
        if short.status is Status.RUNNING and short.generated == 3:
            s.finish(short)
    assert lengths == [(0, 28), (1, 8), (1, 8), (0, 16)]


def test_a_prefix_is_found_shared_and_evicted() -> None:
    c = capacity(pages=8, window_pages=8, prefix_interval=32, prefix_bytes=10**6, page_bytes=1)
    s = Scheduler(c)
    text = list(range(70))
    first = submit(s, 70, 2, keys=prefix_keys(text, 32))
    while s.running:
        plan = s.plan()
        sampled = s.advance(plan)
        if s.prefix_due(first):
            s.keep_prefix(first, first.held, 5)
        for r in sampled:
            if r.generated == 2:
                s.finish(r)
    assert s.prefixes is not None
    assert [e.end for e in s.prefixes.entries.values()] == [32, 64] and s.pages.used == 4
    second = submit(s, 65, 1, keys=prefix_keys(text[:65], 32))
    assert (second.held, len(second.pages), s.pages.used) == (64, 5, 5)
    third = submit(s, 40, 1, keys=prefix_keys([*text[:33], *range(7)], 32))
    assert (third.held, third.pages[:2]) == (32, second.pages[:2]) and s.pages.used == 6
    s.finish(second)
    fourth = submit(s, 128 - 48, 16)  # six pages: two of the eight are third's and the prefix's, one third's own
    assert fourth.status is Status.WAITING
    s.finish(third)
    s.plan()
    assert fourth.status is Status.RUNNING and len(s.prefixes.entries) == 1 and s.prefixes.evictions == 1


def run_prompt(s: Scheduler, text: list[int]) -> Request:
    """Run a prompt for one token and cache its prefixes; `held` of the result is that at admission."""
    request = submit(s, len(text), 1, keys=prefix_keys(text, 32))
    held = request.held
    while s.running:
        s.advance(s.plan())
        if s.prefix_due(request):
            s.keep_prefix(request, None, 5)
        if request.generated:
            s.finish(request)
    request.held = held
    return request


def test_the_same_prompt_runs_its_last_token_again() -> None:
    s = Scheduler(capacity(pages=8, window_pages=8, prefix_interval=32, prefix_bytes=10**6, page_bytes=1))
    text = list(range(64))
    assert [run_prompt(s, t).held for t in (text, text, [*text, 9], [*text[:63], 9])] == [0, 32, 64, 32]


def test_the_entry_a_request_starts_from_is_not_evicted_for_it() -> None:
    s = Scheduler(capacity(pages=6, window_pages=8, prefix_interval=32, prefix_bytes=10**6, page_bytes=1))
    old, new = list(range(33)), list(range(50, 90))
    run_prompt(s, old)
    run_prompt(s, new)
    request = submit(s, 40, 48, keys=prefix_keys([*old[:32], *range(8)], 32))  # the oldest entry, and 4 more pages
    assert s.prefixes is not None
    assert (request.status, request.held, len(s.prefixes.entries)) == (Status.RUNNING, 32, 1)
    assert request.entry in s.prefixes.entries.values()


def test_keys_depend_on_all_tokens_before_them() -> None:
    a, b = prefix_keys([1, 2, 3, 4, 5], 2), prefix_keys([0, 2, 3, 4, 5], 2)
    assert len(a) == 2 and a[0] != b[0] and a[1] != b[1]
    assert prefix_keys([1, 2, 3, 4, 9], 2) == a and prefix_keys([1, 2, 3, 5], 2)[0] == a[0]


def test_a_small_request_does_not_overtake_one_that_waits_for_memory() -> None:
    s = Scheduler(capacity(slots=3))
    big, bigger, small = submit(s, 70, 10), submit(s, 70, 10), submit(s, 1, 1)
    assert [r.status for r in (big, bigger, small)] == [Status.RUNNING, Status.WAITING, Status.WAITING]
    s.finish(big)
    s.plan()
    assert [bigger.status, small.status] == [Status.RUNNING, Status.RUNNING]


def test_a_full_queue_refuses_and_forgets() -> None:
    s = Scheduler(capacity(slots=1, max_waiting=1))
    submit(s, 1, 1)
    submit(s, 1, 1)
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        submit(s, 1, 1)
    assert len(s.waiting) == 1


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [(0, 1, "empty"), (1, 0, "at least 1"), (100, 29, "exceed max_seq_len 128"), (70, 2, "need 5 KV pages of 16")],
)
def test_what_can_never_run_is_refused(prompt: int, new: int, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        submit(Scheduler(capacity(pages=4)), prompt, new)


@pytest.mark.parametrize(
    ("field", "value"),
    [("slots", 0), ("token_budget", 1), ("wait_timeout", float("nan")), ("prefix_interval", 40), ("mixed_prefill", 0)],
)
def test_bad_capacities_are_refused(field: str, value: float) -> None:
    with pytest.raises(JetExportError):
        capacity(**{field: value})


@given(st.integers(0, 20), st.data())
def test_a_pool_gives_each_item_once(size: int, data) -> None:
    pool = Pool(size)
    n = data.draw(st.integers(0, size))
    first = pool.take(n)
    rest = pool.take(size - n)
    assert sorted(first + rest) == list(range(size)) and pool.free == 0
    pool.give(first)
    assert pool.free == n and pool.used == size - n


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys; import jet_export.runtime.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
