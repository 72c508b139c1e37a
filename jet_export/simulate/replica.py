"""One engine in simulated time: the real scheduler, and steps that take what the table says.

The loop is BatchingEngine's: plan, launch, advance, and hand the tokens out when the step ends; with overlap scheduling
the next step is planned and launched before. Steps between two events are taken at once: while the same sequences
decode, none ends, none needs a page and nobody can be admitted, only their lengths and the time change. `advance_to`
takes no more of them than those planned before an arrival, so that the result is that of single steps.

Tokens that a draft would give, grammars and deterministic mode are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jet_export.runtime.pacing import Pacing
from jet_export.runtime.plan import Capacity, Request, Status
from jet_export.runtime.prefix import Entry
from jet_export.runtime.scheduler import QueueFull, Scheduler
from jet_export.simulate.load import Arrival
from jet_export.simulate.prompts import Prompt
from jet_export.simulate.step_times import HOST_BYTES_PER_S, StepTimes

NEVER = float("inf")
OBSERVED = 16  # times that pacing is told of equal steps, at most: its means have settled


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """What a replica is."""

    capacity: Capacity
    times: StepTimes
    overlap: bool  # overlap scheduling, as on a GPU
    pacing: Callable[[], Pacing | None]
    bulk: bool = True  # equal steps are taken at once, which changes nothing but how long the simulation takes


@dataclass(eq=False, slots=True)
class Job:
    """A request of the load on its way."""

    number: int  # in the load
    arrival: Arrival
    prompt: Prompt | None = None  # None: the prefix cache does not see it
    first: float = -1.0  # when its first token was handed out; below 0: not yet
    end: float = -1.0  # when its last one was
    failed: str = ""  # why it has no whole answer
    tries: int = 1
    cached: int = 0  # prompt tokens that the prefix cache had


class CountedCopies:
    """memory.Copies that only take time."""

    def __init__(self, capacity: Capacity, byte: float) -> None:
        self.capacity, self.byte, self.seconds = capacity, byte, 0.0

    def _host(self, tokens: int) -> bool:
        self.seconds += self.capacity.state_bytes(tokens) / HOST_BYTES_PER_S
        return True

    def slot_to_row(self, request: Request, row: int) -> None:
        self.seconds += 2 * self.byte * self.capacity.row_bytes

    def row_to_slot(self, row: int, request: Request, page: int | None) -> None:
        self.seconds += 2 * self.byte * (self.capacity.row_bytes + (page is not None) * self.capacity.page_bytes)

    def row_to_host(self, entry: Entry, at: int) -> bool:
        return self._host(entry.end)

    def slot_to_host(self, request: Request, at: int) -> bool:
        return self._host(request.held)

    def host_to_slot(self, at: int, request: Request) -> None:
        self._host(request.held)

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass(slots=True)
class Step:
    """A launched step, and what is handed out when it ends."""

    launched: float
    end: float
    firsts: list[Request] = field(default_factory=list)  # whose first token it samples
    ended: list[Request] = field(default_factory=list)  # whose last token it samples
    decoding: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """Equal steps that are to come: the first is planned, the others would be planned alike."""

    decode: tuple[Request, ...]
    steps: int
    held: int  # tokens of `decode` together, before the first
    base: float  # when the first starts


class Replica:
    """Not thread-safe. `on_done` gets each job that ends, with its times set."""

    def __init__(self, engine: EngineModel, on_done: Callable[[Job], None] = lambda job: None) -> None:
        self.capacity, self.times, self.overlap, self.bulk = engine.capacity, engine.times, engine.overlap, engine.bulk
        self.copies = CountedCopies(engine.capacity, engine.times.byte)
        pacing, self.on_done = engine.pacing(), on_done
        self.scheduler = Scheduler(engine.capacity, self.copies, pacing)
        self.pacing = pacing if pacing and pacing.seconds is not None else None  # otherwise it looks at no times
        self.jobs: dict[Request, Job] = {}
        self.now = 0.0  # when the host plans next
        self.flight: Step | None = None  # launched ahead, with overlap scheduling
        self.run: Run | None = None
        self.finished = 0.0  # when the last step ended
        self.busy = 0.0  # seconds that steps took
        self.steps = self.most_at_once = 0

    def submit(self, job: Job, now: float) -> bool:
        """A request arrives at `now`, up to which the replica has been advanced; False if its queue is full.

        Raises JetExportError for a request that could never run."""
        if self.next_time == NEVER:
            self.now = max(self.now, now)
        a, prompt = job.arrival, job.prompt
        request = Request(
            prompt_len=a.prompt,
            max_new_tokens=a.output,
            arrival=now,
            text=None if prompt is None else prompt.tokens[: a.prompt],
            hashes=() if prompt is None else prompt.hashes[: a.prompt // self.capacity.page_size],
        )
        try:
            self.scheduler.submit(request)
        except QueueFull:
            return False
        self.jobs[request] = job
        return True

    @property
    def next_time(self) -> float:
        """When `step` is due unless a request arrives before; NEVER while there is nothing to run."""
        if self.run:
            return self._host_after(self.run.steps)
        return self.now if self.jobs or self.flight else NEVER

    def advance_to(self, time: float) -> None:
        """Take every step that is planned before `time`."""
        while self.next_time < time:
            self.step()
        if self.run:
            low, high = 1, self.run.steps
            while low < high:  # the fewest steps after which the host plans at `time` or later
                middle = (low + high) // 2
                low, high = (low, middle) if self._host_after(middle) >= time else (middle + 1, high)
            self._take(low)

    def step(self) -> None:
        """One turn of BatchingEngine.step, at `next_time`; or the beginning or the end of a run of them."""
        if self.run:
            self._take(self.run.steps)
            return
        step, self.flight = self.flight, None
        if step is None:
            step = self._launch(self.now)
            if step is None:
                return
        if self.overlap:
            self.flight = self._launch(step.end, step)
        if not self.run or self.overlap:
            self._hand_out(step)

    def abandon(self) -> list[Job]:
        """It dies: the jobs that it had."""
        jobs, self.jobs, self.flight, self.run = list(self.jobs.values()), {}, None, None
        return jobs

    def _launch(self, start: float, behind: Step | None = None) -> Step | None:
        """Plan at `now` and launch what the device begins at `start`; None if there is nothing. Where `self.run` is
        set then, the plan has been made and its step is the first of a run."""
        s, preempted = self.scheduler, self.scheduler.memory.counts.preemptions
        plan = s.plan()
        for request in s.expire(self.now):
            self._end(request, self.now, "timeout")
        if plan.empty:
            return None
        self.most_at_once = max(self.most_at_once, len(s.running))
        decode = plan.decode
        held = sum([r.held for r in decode])  # lists: a third faster than generators, and this is where the time goes
        copies = self.copies.take()
        plain = not plan.prefill and not copies and s.memory.counts.preemptions == preempted
        settled = behind is not None and not behind.ended if self.overlap else True
        if self.bulk and plain and settled and len(decode) == len(s.running):
            steps = self._steps_alike(decode, start)
            if steps > 1:
                self.run = Run(decode, steps, held, start)
                return None if behind else Step(self.now, start)
        if plan.prefill:
            seconds = self.times.mixed([(first, n) for _, first, n in plan.prefill], len(decode), held)
        else:
            seconds = self.times.plain(len(decode), held)
        sampled = s.advance(plan)
        for request, _, _ in plan.prefill:
            if s.prefix_due(request):
                s.keep_prefix(request, self._tokens(request, request.held))
        self.busy += seconds + copies
        self.steps += 1
        return Step(
            launched=self.now,
            end=start + seconds + copies,
            firsts=[r for r in sampled[: len(sampled) - len(decode)] if r.generated == 1],
            ended=[r for r in sampled if r.generated >= r.max_new_tokens],
            decoding=len(decode),
            prompt_tokens=plan.prefill_tokens,
        )

    def _steps_alike(self, decode: tuple[Request, ...], start: float) -> int:
        """How often these sequences decode until one ends or needs a page, or a waiting request may time out."""
        page = self.capacity.page_size
        steps = min(
            min([r.max_new_tokens - r.generated for r in decode]), min([len(r.pages) * page - r.held for r in decode])
        )
        unstarted = [r.arrival for r in self.scheduler.waiting if not r.preemptions]
        if unstarted and steps > 1:
            longest = self.times.plain(len(decode), sum(r.held for r in decode) + steps * len(decode))
            left = min(unstarted) + self.capacity.wait_timeout - start
            steps = max(1, min(steps, int(left / longest)))
        return steps

    def _host_after(self, steps: int) -> float:
        """When the host plans again after so many of the run, at least 1."""
        run = self.run
        assert run is not None
        return run.base + self.times.plain(len(run.decode), run.held, steps - self.overlap)

    def _take(self, steps: int) -> None:
        """Take so many steps of the run, at least 1, and end it."""
        run, self.run = self.run, None
        assert run is not None
        for request in run.decode:
            request.held += steps
            request.generated += steps
        sequences = len(run.decode)
        seconds = self.times.plain(sequences, run.held, steps)
        done = steps - self.overlap
        self.busy += seconds
        self.steps += steps
        before = run.base + (self.times.plain(sequences, run.held, steps - 1) if steps > 1 else 0.0)
        last = Step(
            launched=self.now,
            end=run.base + seconds,
            ended=[r for r in run.decode if r.generated >= r.max_new_tokens],
            decoding=sequences,
        )
        if self.pacing and done > 0:
            for _ in range(min(done, OBSERVED)):
                self.pacing.observe(sequences, 0, seconds / steps)
        if self.overlap:
            self.flight, self.now, self.finished = last, before, before
        else:
            last.decoding = 0  # it has been observed
            self._hand_out(last)

    def _hand_out(self, step: Step) -> None:
        """Its tokens go out, and the host goes on."""
        self.now = max(self.now, step.end)
        if self.pacing and step.decoding:
            self.pacing.observe(step.decoding, step.prompt_tokens, step.end - max(step.launched, self.finished))
        self.finished = step.end
        for request in step.firsts:
            if request in self.jobs:
                self.jobs[request].first = step.end
        for request in step.ended:
            if request.status is Status.RUNNING and self.scheduler.turn_due(request):
                job = self.jobs[request]
                assert job.prompt is not None
                request.hashes = job.prompt.hashes
                self.scheduler.keep_prefix(request, self._tokens(request, request.held))
            self._end(request, step.end)

    def _tokens(self, request: Request, n: int) -> Sequence[int]:
        prompt = self.jobs[request].prompt
        assert prompt is not None
        return prompt.tokens[:n]

    def _end(self, request: Request, now: float, failed: str = "") -> None:
        """A request has its whole answer, or fails."""
        job = self.jobs.pop(request)
        self.scheduler.finish(request)
        job.end, job.failed, job.cached = now, failed, request.cached_tokens or 0
        self.on_done(job)
