"""Invariants of the scheduler, under any order of arrivals, steps, preemptions, early ends and cancellations."""

from collections import Counter

import pytest
from helpers.fake_copies import FakeCopies, capacities, fits, submit
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jet_export.runtime.plan import Capacity, Plan, Request, Status
from jet_export.runtime.prefix import page_hashes
from jet_export.runtime.scheduler import QueueFull, Scheduler
from jet_export.utils.errors import JetExportError

SEEN: Counter[str] = Counter()  # what happened in all runs of the machines


class Life(RuleBasedStateMachine):
    """A scheduler, and a device that records which tokens are in each slot, page, row and part of the host's memory."""

    @initialize(capacity=capacities())
    def start(self, capacity: Capacity) -> None:
        self.begin(capacity)

    def begin(self, capacity: Capacity) -> None:
        self.c, self.now = capacity, 0.0
        self.device = FakeCopies(capacity.page_size)
        self.s = Scheduler(capacity, self.device)
        self.alive: list[Request] = []  # by arrival
        self.started: set[Request] = set()
        self.count = 0
        self.text: dict[Request, list[int]] = {}  # its prompt, then numbers unique to it as generated tokens
        self.in_flight: set[Request] = set()  # those whose last token is not known yet

    @rule(
        common=st.integers(0, 50),
        own=st.integers(1, 9),
        new=st.integers(1, 30),
        family=st.integers(0, 1),
        priority=st.sampled_from([0, 0, 0, -1, 5]),
    )
    def submit(self, common: int, own: int, new: int, family: int, priority: int = 0) -> None:
        """A prompt that shares a prefix with others of its family."""
        unique = 100 + 200 * self.count
        text = [family] * common + list(range(unique, unique + own + new))
        self.accept(text, common + own, new, text=text[: common + own], priority=priority)
        for _ in range(common // 8):  # part of it runs before the next prompt of the family arrives
            self.step()

    @rule(prompts=st.lists(st.tuples(st.integers(16, 40), st.integers(10, 40)), min_size=2, max_size=5))
    def submit_together(self, prompts: list[tuple[int, int]]) -> None:
        """They fit one by one, and outgrow the pages together."""
        for common, new in prompts:
            self.submit(common, 1, new, 0)

    @rule(more=st.integers(1, 9), new=st.integers(1, 9), data=st.data())
    def next_turn(self, more: int, new: int, data) -> None:
        """A prompt that continues what an earlier request has held, its answer included."""
        if not self.device.told:
            return
        before, unique = data.draw(st.sampled_from(self.device.told)), 100 + 200 * self.count
        text = [*before, *range(unique, unique + more + new)]
        self.accept(text, len(before) + more, new, text=text[: len(before) + more])
        self.step(9)

    @rule(length=st.integers(1, 60), more=st.integers(0, 20), new=st.integers(2, 20), sampled=st.booleans())
    def continue_session(self, length: int, more: int, new: int, sampled: bool) -> None:
        """A session of `length` tokens, continued with a prompt or without."""
        unique = 100 + 200 * self.count
        text = list(range(unique, unique + length + more + new))
        self.accept(text, length + more, new, start=length, generated=int(sampled and not more))

    def accept(self, whole: list[int], prompt: int, new: int, **options) -> None:
        if "text" in options and self.s.prefixes:
            options["hashes"] = page_hashes(options["text"], self.c.page_size)
        full = sum(not r.preemptions for r in self.s.waiting) >= self.c.max_waiting + self.s.slots.free
        if not fits(self.c, prompt, new):
            with pytest.raises(JetExportError):
                submit(self.s, prompt, new, self.now, **options)
            return
        try:
            request = submit(self.s, prompt, new, self.now, **options)
        except QueueFull:
            assert full
            return
        assert not full
        self.count += 1
        self.text[request] = whole
        self.alive.append(request)

    def plan(self) -> Plan:
        """Plan a step, and prepare those that have a slot for the first time, as the executor does."""
        before = set(self.s.running)
        plan = self.s.plan()
        for r in self.s.running:
            if r not in before:
                assert r not in self.in_flight and not r.prepared  # all that it has sampled is known
                self.started.add(r)
                if not r.restored:  # a session's states are copied in
                    assert r.held == r.start
                    for p in range(r.start):
                        self.write(r, p)
                    self.device.slots[r.slot] = self.text[r][: r.start]
        for r in {*(r for r, _, _ in plan.prefill), *plan.decode, *plan.resumed}:
            r.prepared = True
        self.check_plan(plan)
        return plan

    def write(self, r: Request, p: int) -> None:
        """A page that is written to is its request's own, and no entry has tokens from there on."""
        i, offset = divmod(p, self.c.page_size)
        assert not any(r.pages[i] in other.pages for other in self.s.running if other is not r)
        for e in self.s.prefixes.entries.values() if self.s.prefixes else ():
            if r.pages[i] in e.pages:
                assert e.pages.index(r.pages[i]) * self.c.page_size + offset >= e.end
        self.device.memory[r.pages[i], offset] = self.text[r][p]

    @rule(times=st.integers(1, 15))
    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.land(self.launch(self.plan(), set()))

    @rule()
    def step_with_overlap(self) -> None:
        """The next step is planned and launched before this one's tokens are read; all laws of a plan hold for it."""
        sampled = self.launch(self.plan(), set())
        self.in_flight = set(sampled)
        overlapped = self.plan()
        assert not any(r.launched for r in (*overlapped.decode, *overlapped.resumed))
        then = self.launch(overlapped, set())
        self.in_flight = set()
        self.land([r for r in sampled if r not in then])
        self.land(then)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def step_with_a_cancellation_inside(self, data) -> None:
        plan = self.plan()
        victim = data.draw(st.sampled_from(self.alive))
        self.end(victim)
        self.check_memory()
        self.land(self.launch(plan, {victim}))

    @precondition(lambda self: self.s.running)
    @rule(data=st.data())
    def stop_early(self, data) -> None:
        """A stop token ends a request, after which another prompt may continue its text."""
        r = data.draw(st.sampled_from(self.s.running))
        if self.s.turn_due(r) and r.prepared and r.generated:
            self.s.keep_prefix(r, self.text[r][: r.held])
        self.end(r)

    def check_plan(self, plan: Plan) -> None:
        assert plan.tokens <= self.c.token_budget
        if plan.decode and self.c.mixed_prefill is not None:
            assert plan.prefill_tokens <= self.c.mixed_prefill
        planned = [r for r, _, _ in plan.prefill] + list(plan.decode) + list(plan.resumed)
        assert len(planned) == len(set(planned)) and all(r.status is Status.RUNNING for r in planned)
        assert all(1 <= n <= self.c.prefill_chunk and first == r.held for r, first, n in plan.prefill)
        running = [r for r in self.s.running if not r.launched]  # the others wait for their last token
        late = {r for r in running if not r.in_prompt} - {*plan.decode, *plan.resumed}
        if late:  # decode only waits for pages that will be free when a step in flight has ended
            assert len(late) == 1 and len(self.s.running) > len(running) and not self.s.pages.free
        assert {*plan.decode, *plan.resumed} | late == {r for r in running if not r.in_prompt}
        assert all(r.held == r.prompt_len == r.start and not r.generated for r in plan.resumed)
        assert all(r.held < len(r.pages) * self.c.page_size for r in plan.decode)
        if self.c.whole_chunks:
            assert all(
                (first + n) % self.c.prefill_chunk == 0 or first + n == r.prompt_len for r, first, n in plan.prefill
            )
        for r in planned:
            text = self.text[r][: r.held]
            assert (
                self.device.read(r.pages, r.held) == text == self.device.slots[r.slot]
            )  # it goes on from its own text
        if any(r.in_prompt for r in running):
            assert plan.prefill  # a prompt always makes progress
            assert plan.prefill[0][0] is next(r for r in running if r.in_prompt)
        assert bool(planned) == bool(running) or late
        assert running or not self.s.waiting or self.s.running  # no one waits while nothing runs
        for r, n in plan.grown:
            assert 0 < n <= len(r.pages) <= self.c.pages_for(r.max_held)[0]

    def launch(self, plan: Plan, gone: set[Request]) -> list[Request]:
        self.now += 1
        fed = [*plan.prefill, *((r, r.held, 1) for r in plan.decode)]
        replayed = {r for r, _, _ in plan.prefill if r.generated}
        for r, first, n in fed:
            if r not in gone:
                for p in range(first, first + n):
                    self.write(r, p)
                self.device.slots[r.slot] = self.text[r][: first + n]
        sampled = self.s.advance(plan)
        for r, _, _ in plan.prefill:
            if self.s.prefix_due(r):
                assert r not in gone and (not self.c.whole_chunks or r.held % self.c.prefix_interval == 0)
                self.s.keep_prefix(r, self.text[r][: r.held])
        ended = {r for r, first, n in plan.prefill if first + n == r.prefill_len} - replayed
        assert set(sampled) == (ended | {*plan.decode, *plan.resumed}) - gone
        for r in sampled:
            assert r.held == r.prompt_len + r.generated - 1
        return sampled

    def land(self, sampled: list[Request]) -> None:
        for r in sampled:
            if r.launched:
                if self.s.turn_due(r):
                    self.s.keep_prefix(r, self.text[r][: r.held])
                    self.device.told.append(self.text[r][: r.held])
                self.end(r)

    def end(self, r: Request) -> None:
        self.s.finish(r)
        self.alive.remove(r)
        assert r.slot == -1 and not r.pages and r.kept is None

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), again=st.booleans())
    def cancel(self, data, again: bool) -> None:
        victim = data.draw(st.sampled_from(self.alive))
        self.end(victim)
        if again:
            self.s.finish(victim)

    @rule(seconds=st.sampled_from([0.5, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        waiting = [r for r in self.s.waiting if r not in self.started]
        late = self.s.expire(self.now)
        assert late == [r for r in waiting if self.now - r.arrival > self.c.wait_timeout]
        self.alive = [r for r in self.alive if r not in late]

    @invariant()
    def check_memory(self) -> None:
        if not hasattr(self, "s"):
            return
        s, running, prefixes = self.s, self.s.running, self.s.prefixes
        entries = list(prefixes.entries.values()) if prefixes else []
        hosted = list(prefixes.hosted.values()) if prefixes else []
        pools = [(s.slots, [r.slot for r in running]), (s.window_pages, [p for r in running for p in r.window_pages])]
        if prefixes:
            pools.append((prefixes.rows, [e.row for e in entries]))
        for pool, owned in pools:
            assert len(owned) == len(set(owned)) == pool.used  # owned once, none leaked
            assert sorted(owned + pool._free) == list(range(pool.size))
        holders = Counter(p for r in running for p in r.pages) + Counter(p for e in entries for p in e.pages)
        assert s.pages.holders == [holders[i] for i in range(s.pages.size)]
        assert sorted([*holders, *s.pages._free]) == list(range(s.pages.size))
        assert not prefixes or all(r in running and r.branch for r in prefixes.claims.values())
        for r in running:
            assert len(r.pages) == len(set(r.pages)) and r.held <= len(r.pages) * self.c.page_size
            assert len(r.window_pages) == self.c.pages_for(r.max_held)[1]
        kept = {r.kept: self.c.state_bytes(r.held) for r in s.waiting if r.kept is not None}
        kept |= {e.at: self.c.state_bytes(e.end) for e in hosted if e.at is not None}
        assert s.memory.host.parts == kept
        for e in entries:
            text = self.device.rows[e.row]
            assert (
                len(text) == e.end == len(self.device.read(e.pages, e.end)) and self.device.read(e.pages, e.end) == text
            )
            assert prefixes and e.key == prefixes.key(text, page_hashes(text, self.c.page_size))
            if self.c.whole_chunks:
                assert e.end % self.c.prefix_interval == 0
        for requests in (running, list(s.waiting)):
            assert requests == sorted(requests, key=lambda r: (r.priority, self.alive.index(r)))
        for priority in {r.priority for r in self.alive}:  # no one overtakes another of its priority
            alive = [r for r in self.alive if r.priority == priority]
            assert [r for r in (*running, *s.waiting) if r.priority == priority] == alive
            assert [r for r in alive if r in self.started] == alive[: len(self.started & set(alive))]

    def teardown(self) -> None:
        if not hasattr(self, "s"):
            return
        self.finish()
        counts = self.s.memory.counts
        SEEN.update(hits=counts.hits, host_hits=counts.host_hits, preemptions=counts.preemptions)
        SEEN.update(bytes_in=counts.bytes_in)

    def finish(self) -> None:
        """No starvation: all end, each within as many steps as it has tokens once it is the first. One that runs is so
        until one of a lower priority is admitted."""
        steps = sum(r.prompt_len + r.max_new_tokens for r in self.alive)
        for _ in range(steps * len({r.priority for r in self.alive})):
            if not self.alive:
                break
            self.step()
            self.check_memory()
        assert not self.alive and not self.s.running and not self.s.waiting
        while self.s.memory.evict():
            self.check_memory()
        assert self.s.slots.used == self.s.pages.used == self.s.window_pages.used == 0


class SharingLife(Life):
    """With a prefix cache."""

    @initialize(capacity=capacities(cached=True))
    def start(self, capacity: Capacity) -> None:
        self.begin(capacity)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
SharingLife.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLife, TestSharingLife = Life.TestCase, SharingLife.TestCase


def test_the_machines_saw_everything() -> None:
    """So that the machines mean something: all of it happens dozens of times."""
    assert not SEEN or all(SEEN[x] for x in ("hits", "preemptions", "bytes_in")), SEEN
