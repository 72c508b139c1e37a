"""What a run gave: latencies, goodput at a service level objective (SLO), and GPU hours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jet_export.bench.timer import percentile
from jet_export.simulate.cluster import Outcome
from jet_export.simulate.replica import Job
from jet_export.utils.errors import JetExportError

PERCENTILES = (0.5, 0.9, 0.95, 0.99)
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, kw_only=True)
class Slo:
    """The most seconds that a request may take; None: any."""

    ttft: float | None = None  # to the first token
    tpot: float | None = None  # per token after it, the mean of a request
    e2e: float | None = None  # to the last token

    def met(self, job: Job) -> bool:
        if job.failed:
            return False
        asked = ((self.ttft, ttft(job)), (self.tpot, tpot(job)), (self.e2e, job.end - job.arrival.at))
        return all(most is None or took is None or took <= most for most, took in asked)

    def __str__(self) -> str:
        given = {k: v for k, v in self.__dict__.items() if v is not None}
        return ", ".join(f"{k} {1e3 * v:g} ms" for k, v in given.items()) or "none"


def parse_slo(text: str) -> Slo:
    """ "ttft=500ms,tpot=30ms" -> Slo; units us, ms, s. Raises JetExportError."""
    found: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, value = part.strip().split("=")
            unit = next(u for u in UNITS if value.endswith(u))
            found[name] = float(value.removesuffix(unit)) * UNITS[unit]
            if name not in ("ttft", "tpot", "e2e") or not 0 < found[name] < math.inf:
                raise ValueError
    except (ValueError, StopIteration):
        raise JetExportError(
            f"--slo {text}: not a list of times.", "For example: ttft=500ms,tpot=30ms,e2e=20s"
        ) from None
    return Slo(**found)


def ttft(job: Job) -> float:
    """Seconds from the arrival to the first token."""
    return job.first - job.arrival.at


def tpot(job: Job) -> float | None:
    """Mean seconds per token after the first; None where there is only one."""
    return (job.end - job.first) / (job.arrival.output - 1) if job.arrival.output > 1 else None


def summary(outcome: Outcome, slo: Slo | None = None) -> dict[str, Any]:
    """The figures of a run, times in milliseconds. tokens/s are generated ones, of requests with their whole answer."""
    jobs, o = outcome.jobs, outcome
    good = [j for j in jobs if not j.failed]
    tokens = sum(j.arrival.output for j in good)
    hours = o.replica_seconds / 3600
    seconds = max(o.seconds, 1e-9)
    out: dict[str, Any] = {
        "requests": len(jobs),
        "failed": dict(Counter(j.failed for j in jobs if j.failed)),
        "seconds": o.seconds,
        "requests_per_s": len(good) / seconds,
        "tokens_per_s": tokens / seconds,
        "prompt_tokens_per_s": sum(j.arrival.prompt for j in good) / seconds,
        "ttft_ms": percentiles([1e3 * ttft(j) for j in good]),
        "tpot_ms": percentiles([1e3 * t for j in good if (t := tpot(j)) is not None]),
        "e2e_ms": percentiles([1e3 * (j.end - j.arrival.at) for j in good]),
        "gpu_hours": hours,
        "gpu_hours_per_million_tokens": 1e6 * hours / tokens if tokens else None,
        "busy": o.busy_seconds / o.replica_seconds if o.replica_seconds else 0.0,
        "most_replicas": o.most_replicas,
        "most_at_once": o.most_at_once,
        "steps": o.steps,
        "cached_prompt_tokens": sum(j.cached for j in good) / max(1, sum(j.arrival.prompt for j in good)),
        "preemptions": o.preemptions,
        "replica_failures": o.failures,
    }
    if slo is not None:
        met = sum(map(slo.met, jobs))
        out["slo"] = {"asked": str(slo), "met": met / len(jobs), "goodput_requests_per_s": met / seconds}
    return out


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{100 * s:g}": percentile(list(values), s) for s in PERCENTILES} if values else {}
