"""Laws of the scheduler, under any order of arrivals, steps and cancellations."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jet_export.errors import JetExportError
from jet_export.runtime.scheduler import Capacity, Pool, QueueFull, Request, Scheduler, Status


@st.composite
def capacities(draw) -> Capacity:
    slots = draw(st.integers(1, 5))
    page, ring = draw(st.sampled_from([1, 4, 16])), draw(st.integers(1, 6))
    return Capacity(
        slots=slots,
        pages=draw(st.integers(1, 24)),
        window_pages=draw(st.integers(1, 12)),
        page_size=page,
        ring_pages=ring,
        max_seq_len=draw(st.integers(2, 24 * page)),
        prefill_chunk=draw(st.integers(1, 20)),
        token_budget=slots + draw(st.integers(0, 30)),
        max_waiting=draw(st.integers(0, 6)),
        wait_timeout=draw(st.sampled_from([2.0, 50.0])),
    )


def fits(c: Capacity, prompt: int, new: int) -> bool:
    pages, window = c.pages_for(prompt + new - 1)
    return prompt + new <= c.max_seq_len and pages <= c.pages and window <= c.window_pages


class Life(RuleBasedStateMachine):
    """A scheduler, and beside it a count of what each request was fed and what it made."""

    @initialize(capacity=capacities())
    def start(self, capacity: Capacity) -> None:
        self.c, self.s, self.now = capacity, Scheduler(capacity), 0.0
        self.alive: list[Request] = []
        self.order: list[Request] = []  # of arrival, those accepted
        self.admitted: list[Request] = []
        self.fed: Counter[Request] = Counter()

    @rule(prompt=st.integers(1, 60), new=st.integers(1, 20))
    def submit(self, prompt: int, new: int) -> None:
        full = len(self.s.waiting) >= self.c.max_waiting
        if not fits(self.c, prompt, new):
            with pytest.raises(JetExportError):
                self.s.submit(prompt, new, self.now)
            return
        try:
            request = self.s.submit(prompt, new, self.now)
        except QueueFull:
            assert full
            return
        self.alive.append(request)
        self.order.append(request)
        self.note_admissions()

    def note_admissions(self) -> None:
        self.admitted += [r for r in self.s.running if r not in self.admitted]

    @rule()
    def step(self) -> None:
        plan = self.s.plan()
        self.note_admissions()
        self.check_plan(plan)
        self.run(plan, set())

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def step_with_a_cancellation_inside(self, data) -> None:
        plan = self.s.plan()
        self.note_admissions()
        victim = data.draw(st.sampled_from(self.alive))
        self.s.cancel(victim)
        self.alive.remove(victim)
        self.check_memory()
        self.run(plan, {victim})

    def check_plan(self, plan) -> None:
        assert plan.tokens <= self.c.token_budget
        planned = [r for r, _, _ in plan.prefill] + list(plan.decode)
        assert len(planned) == len(set(planned))
        assert all(1 <= n <= self.c.prefill_chunk and first == r.held for r, first, n in plan.prefill)
        running = self.s.running
        assert set(plan.decode) == {r for r in running if not r.in_prompt}  # decode is never held up
        if any(r.in_prompt for r in running):
            assert plan.prefill  # and some prompt always moves on
            assert plan.prefill[0][0] is next(r for r in running if r.in_prompt)
        assert bool(planned) == bool(running)

    def run(self, plan, gone: set[Request]) -> None:
        self.now += 1
        made = self.s.advance(plan)
        for r, _, n in plan.prefill:
            self.fed[r] += n
        for r in plan.decode:
            self.fed[r] += 1
        expected = {r for r, first, n in plan.prefill if first + n == r.prompt_len} | set(plan.decode)
        assert set(made) == expected - gone
        for r in made:
            assert self.fed[r] == r.held == r.prompt_len + r.made - 1  # conservation
            if r.made == r.max_new_tokens:
                self.s.finish(r)
                self.alive.remove(r)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), again=st.booleans())
    def cancel(self, data, again: bool) -> None:
        victim = data.draw(st.sampled_from(self.alive))
        self.s.cancel(victim)
        if again:
            self.s.cancel(victim)
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
        for pool, owned in (
            (s.slots, [r.slot for r in running]),
            (s.pages, [p for r in running for p in r.pages]),
            (s.window_pages, [p for r in running for p in r.window_pages]),
        ):
            assert len(owned) == len(set(owned)) == pool.used  # none twice, none leaked
            assert sorted(owned + pool._free) == list(range(pool.size))
        for r in running:
            assert r.held <= r.most_held <= len(r.pages) * self.c.page_size
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
        """No starvation: everything that is left ends, in a number of steps that the work bounds."""
        if not hasattr(self, "s"):
            return
        work = sum(r.prompt_len + r.max_new_tokens for r in self.alive)
        for _ in range(work):
            if not self.alive:
                break
            self.step()
            self.check_memory()
        assert not self.alive and not self.s.running and not self.s.waiting
        assert self.s.slots.used == self.s.pages.used == self.s.window_pages.used == 0


Life.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


def capacity(**changes) -> Capacity:
    values = {
        "slots": 2, "pages": 8, "window_pages": 4, "page_size": 16, "ring_pages": 2, "max_seq_len": 128,
        "prefill_chunk": 32, "token_budget": 32, "max_waiting": 3, "wait_timeout": 10.0,
    }  # fmt: skip
    return Capacity(**{**values, **changes})


def test_a_long_prompt_does_not_hold_up_decoding() -> None:
    s = Scheduler(capacity(token_budget=8))
    short = s.submit(4, 20, 0.0)
    s.advance(s.plan())
    long = s.submit(60, 4, 0.0)
    while long.in_prompt:
        plan = s.plan()
        assert plan.decode == (short,) and plan.prefill[0][2] <= 7
        s.advance(plan)
    assert short.made == 1 + 9  # 60 tokens at 7 a step


def test_a_small_request_does_not_overtake_one_that_waits_for_memory() -> None:
    s = Scheduler(capacity(slots=3))
    big, bigger, small = s.submit(70, 10, 0.0), s.submit(70, 10, 0.0), s.submit(1, 1, 0.0)
    assert [r.status for r in (big, bigger, small)] == [Status.RUNNING, Status.WAITING, Status.WAITING]
    s.cancel(big)
    s.plan()
    assert [bigger.status, small.status] == [Status.RUNNING, Status.RUNNING]


def test_a_full_queue_refuses_and_forgets() -> None:
    s = Scheduler(capacity(slots=1, max_waiting=1))
    s.submit(1, 1, 0.0)
    s.submit(1, 1, 0.0)
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        s.submit(1, 1, 0.0)
    assert len(s.waiting) == 1


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [(0, 1, "empty"), (1, 0, "at least 1"), (100, 29, "exceed max_seq_len 128"), (70, 2, "need 5 KV pages of 16")],
)
def test_what_can_never_run_is_refused(prompt: int, new: int, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        Scheduler(capacity(pages=4)).submit(prompt, new, 0.0)


@pytest.mark.parametrize(("field", "value"), [("slots", 0), ("token_budget", 1), ("wait_timeout", float("nan"))])
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
