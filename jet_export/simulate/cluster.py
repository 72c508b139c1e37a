"""Several replicas behind a router in simulated time, with autoscaling and failures.

Everything happens in the order of its time: arrivals, steps, ends of requests (of which the router learns at once),
failures, and decisions to scale. A replica that fails loses its requests: those that have had no token go to another
and keep their time of arrival, the others end with an error; a new replica comes `restart_s` later.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jet_export.runtime.routing import SLACK, Router
from jet_export.simulate.load import Arrival
from jet_export.simulate.loads import Loads
from jet_export.simulate.prompts import Prompts
from jet_export.simulate.replica import NEVER, EngineModel, Job, Replica
from jet_export.utils.errors import JetExportError

TRIES = 3  # replicas that a request is given to, one after the other, before it fails


@dataclass(frozen=True, kw_only=True)
class Autoscale:
    """Replicas so that each has `target` requests, looked at every `interval_s`; Ray Serve's rule."""

    least: int
    most: int
    target: float
    interval_s: float = 10.0
    start_s: float = 60.0  # from the decision to the first request
    down_after_s: float = 600.0  # too many for so long, before one goes

    def __post_init__(self) -> None:
        if not (1 <= self.least <= self.most and self.target > 0 and self.interval_s > 0):
            raise JetExportError(
                f"--autoscale {self.least}:{self.most} at {self.target} requests each: not a range of replicas.",
                "For example: --autoscale 2:16 --target-requests 32",
            )


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Each replica fails at random, on average after `mtbf_s` seconds."""

    mtbf_s: float
    restart_s: float = 120.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """How the load is served."""

    replicas: int
    router: str = "prefix"
    slack: int = SLACK
    autoscale: Autoscale | None = None
    failures: Failures | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of every request, in the order of the load, and what it took."""

    jobs: list[Job]
    seconds: float  # from the first arrival to the end of the last request
    replica_seconds: float  # of replicas that existed, each until the end or its own
    busy_seconds: float  # of these, in which steps ran
    steps: int
    most_replicas: int
    most_at_once: int  # requests running on a replica
    failures: int
    preemptions: int
    scale: list[tuple[float, int]]  # (time, replicas from then on)


class GaveUp(Exception):
    """A run was ended before its time."""


class Cluster:
    """One run of a load."""

    def __init__(self, engine: EngineModel, plan: ClusterPlan) -> None:
        if plan.replicas < 1:
            raise JetExportError(f"--replicas {plan.replicas}: must be at least 1.")
        self.engine, self.plan = engine, plan
        self.router: Router[int] = Router(plan.router, slack=plan.slack)
        self.replicas: dict[int, Replica] = {}
        self.loads = Loads()  # of the replicas that take requests
        self.born: dict[int, float] = {}
        self.names = itertools.count()
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.order = itertools.count()
        self.steps_due: list[tuple[float, int, int]] = []  # (time, replica, version)
        self.version: dict[int, int] = {}
        self.ends: list[tuple[float, int]] = []  # (time, replica) of requests that have ended
        self.waiting: deque[Job] = deque()  # while there is no replica
        self.random = random.Random(plan.failures.seed if plan.failures else 0)
        self.now = self.replica_seconds = self.busy = 0.0
        self.steps = self.most = self.failed = self.preemptions = self.most_at_once = 0
        self.left = 0  # requests that have not ended
        self.give_up: Callable[[Job], bool] = lambda job: False
        self.starting = 0  # replicas
        self.draining: set[int] = set()  # they take no more requests, and go when they have none
        self.too_many_since: float | None = None
        self.scale: list[tuple[float, int]] = []

    def serve(
        self,
        load: Sequence[Arrival],
        emit: Callable[[int], None] = lambda done: None,
        give_up: Callable[[Job], bool] = lambda job: False,
    ) -> Outcome:
        """Run the load. `emit` gets the number of requests that have arrived, now and then. `give_up` is asked at the
        end of each request; raises GaveUp once it says so."""
        self.give_up = give_up
        prompts = Prompts(self.engine.capacity.page_size) if self.engine.capacity.prefix_interval else None
        for _ in range(self.plan.replicas):
            self._start(0.0)
        if self.plan.autoscale:
            self._at(self.plan.autoscale.interval_s, self._autoscale)
        jobs = [Job(i, a) for i, a in enumerate(load)]
        self.left = len(jobs)
        for job in jobs:
            if job.number % 1000 == 0:
                emit(job.number)
            self._until(job.arrival.at)
            job.prompt = prompts.of(job.arrival) if prompts else None
            self._route(job, job.arrival.at)
        while self.left:
            due = min(heap[0][0] for heap in (self.steps_due, self.events) if heap)
            self._until(due, inclusive=True)
        end = max((j.end for j in jobs), default=0.0)
        scale = list(self.scale)
        for name in list(self.replicas):
            self._count(name, max(end, self.now))
        return Outcome(
            jobs=jobs,
            seconds=end,
            replica_seconds=self.replica_seconds,
            busy_seconds=self.busy,
            steps=self.steps,
            most_replicas=self.most,
            most_at_once=self.most_at_once,
            failures=self.failed,
            preemptions=self.preemptions,
            scale=scale,
        )

    # -- time

    def _at(self, time: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (time, next(self.order), what))

    def _until(self, time: float, inclusive: bool = False) -> None:
        """Everything before `time`; `inclusive`: and at it."""
        while True:
            step = self.steps_due[0][0] if self.steps_due else NEVER
            event = self.events[0][0] if self.events else NEVER
            due = min(step, event)
            if due > time or (due == time and not inclusive) or due == NEVER:
                break
            self.now = due
            if event <= step:
                _, _, what = heapq.heappop(self.events)
                what(event)
            else:
                _, name, version = heapq.heappop(self.steps_due)
                if self.version.get(name) == version:
                    self.replicas[name].step()
                    self._due(name)
        self.now = max(self.now, time)
        while self.ends and self.ends[0][0] <= time:
            _, name = heapq.heappop(self.ends)
            if name in self.loads:
                self.loads[name] -= 1

    def _due(self, name: int) -> None:
        self.version[name] = version = self.version[name] + 1
        if (time := self.replicas[name].next_time) < NEVER:
            heapq.heappush(self.steps_due, (time, name, version))

    # -- requests

    def _route(self, job: Job, now: float) -> None:
        if not self.loads:
            self.waiting.append(job)
            return
        prefixes = job.prompt.hashes[: job.arrival.prompt // self.engine.capacity.page_size] if job.prompt else ()
        name = self.router.choose(self.loads, job.arrival.session, self._shared(job, prefixes), self.loads.least())
        replica = self.replicas[name]
        replica.advance_to(now)
        if replica.submit(job, now):
            self.loads[name] += 1
        else:
            self._fails(job, "refused", now)
        self._due(name)

    def _shared(self, job: Job, prefixes: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """What the router looks at: the pages of prompts of which any may be known."""
        return prefixes if job.arrival.blocks else ()

    def _done(self, name: int) -> Callable[[Job], None]:
        def done(job: Job) -> None:
            self._ended(job)
            heapq.heappush(self.ends, (job.end, name))
            if name in self.draining and not self.replicas[name].jobs:
                self._at(job.end, lambda now: self._drained(name, now))

        return done

    def _fails(self, job: Job, why: str, now: float) -> None:
        job.failed, job.end = why, now
        self._ended(job)

    def _ended(self, job: Job) -> None:
        self.left -= 1
        if self.give_up(job):
            raise GaveUp

    # -- replicas

    def _start(self, now: float) -> None:
        name = next(self.names)
        e = self.engine
        replica = Replica(e, self._done(name))
        self.replicas[name], self.loads[name], self.born[name], self.version[name] = replica, 0, now, 0
        self.most = max(self.most, len(self.replicas))
        self.scale.append((now, len(self.replicas)))
        if self.plan.failures:
            self._at(now + self.random.expovariate(1 / self.plan.failures.mtbf_s), lambda t: self._fail(name, t))
        while self.waiting:
            self._route(self.waiting.popleft(), now)

    def _count(self, name: int, now: float) -> Replica:
        """A replica is no more."""
        replica = self.replicas.pop(name)
        self.loads.pop(name, None)
        self.version.pop(name)
        self.draining.discard(name)
        self.router.forget(name)
        self.scale.append((now, len(self.replicas)))
        self.replica_seconds += now - self.born.pop(name)
        self.busy += replica.busy
        self.steps += replica.steps
        self.preemptions += replica.scheduler.memory.counts.preemptions
        self.most_at_once = max(self.most_at_once, replica.most_at_once)
        return replica

    def _fail(self, name: int, now: float) -> None:
        if name not in self.replicas or self.plan.failures is None:
            return
        self.replicas[name].advance_to(now)
        jobs = self._count(name, now).abandon()
        self.failed += 1
        self._at(now + self.plan.failures.restart_s, self._start)
        for job in jobs:
            if 0 <= job.first <= now or job.tries >= TRIES:
                self._fails(job, "error", now)
            else:
                job.first, job.tries = -1.0, job.tries + 1
                self._route(job, now)

    def _autoscale(self, now: float) -> None:
        rule = self.plan.autoscale
        assert rule is not None
        self._at(now + rule.interval_s, self._autoscale)
        wanted = math.ceil((sum(self.loads.values()) + len(self.waiting)) / rule.target)
        wanted = max(rule.least, min(rule.most, wanted))
        have = len(self.loads) + self.starting
        if wanted >= have:
            self.too_many_since = None
        for _ in range(wanted - have):
            self.starting += 1
            self._at(now + rule.start_s, self._started)
        if wanted < have:
            self.too_many_since = now if self.too_many_since is None else self.too_many_since
            if now - self.too_many_since >= rule.down_after_s and len(self.loads) > max(wanted, 1):
                self._drain(min(self.loads, key=self.loads.__getitem__), now)

    def _started(self, now: float) -> None:
        self.starting -= 1
        self._start(now)

    def _drain(self, name: int, now: float) -> None:
        del self.loads[name]
        self.draining.add(name)
        if not self.replicas[name].jobs:
            self._drained(name, now)

    def _drained(self, name: int, now: float) -> None:
        if name in self.draining:
            self._count(name, now)
