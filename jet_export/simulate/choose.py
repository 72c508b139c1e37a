"""The fewest replicas that meet an SLO, by simulating a load on one number after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from jet_export.simulate.cluster import Cluster, ClusterPlan, GaveUp, Outcome
from jet_export.simulate.load import Arrival
from jet_export.simulate.measures import Slo
from jet_export.simulate.replica import EngineModel, Job
from jet_export.utils.errors import JetExportError

MOST = 4096  # replicas


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A number of replicas, and whether enough requests met the SLO; a run ends as soon as they cannot."""

    replicas: int
    met: bool


def fewest(
    engine: EngineModel,
    plan: ClusterPlan,
    load: Sequence[Arrival],
    slo: Slo,
    share: float,
    emit: Callable[[str], None] = lambda line: None,
) -> tuple[int, Outcome, list[Tried]]:
    """The fewest replicas with which `share` of the requests meet the SLO, that run, and what was tried: doubling, then
    halving the interval, as more replicas are taken to do no worse. Raises JetExportError where MOST do not."""
    tried: list[Tried] = []
    found: dict[int, Outcome] = {}
    allowed = int((1 - share) * len(load) + 1e-9)

    def enough(n: int) -> bool:
        missed = 0

        def give_up(job: Job) -> bool:
            nonlocal missed
            missed += not slo.met(job)
            return missed > allowed

        with suppress(GaveUp):
            found[n] = Cluster(engine, replace(plan, replicas=n)).serve(load, give_up=give_up)
        tried.append(Tried(replicas=n, met=n in found))
        emit(f"{n} replicas: {'enough' if n in found else 'too few'}")
        return n in found

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST:
            raise JetExportError(
                f"simulate --replicas auto: {low} replicas do not meet {slo} for {share:.1%} of the requests.",
                "A single request may take longer than that: simulate a low --rate on one replica to see.",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high, found[high], tried
