"""Several replicas: routing, autoscaling, failures, and the fewest that meet an SLO."""

from dataclasses import replace
from functools import partial

import pytest

from jet_export.runtime.plan import Capacity
from jet_export.simulate.choose import fewest
from jet_export.simulate.cluster import Autoscale, Cluster, ClusterPlan, Failures, Outcome
from jet_export.simulate.load import Arrival, Lengths, Poisson
from jet_export.simulate.measures import Slo, parse_slo, summary
from jet_export.simulate.replica import EngineModel
from jet_export.simulate.step_times import DecodeTimes, PromptTimes, StepTimes, Window
from jet_export.utils.errors import JetExportError

DECODE = DecodeTimes(
    fixed=0.01, fixed_alone=0.01, sequence=0.0005, sequence_alone=0.0005, token=0.0, window=Window(token=0.0, size=0)
)
CAPACITY = Capacity(
    slots=8, pages=400, window_pages=80, page_size=32, ring_pages=9, max_seq_len=2048, prefill_chunk=256,
    token_budget=264, max_waiting=1000, wait_timeout=1e6,
)  # fmt: skip
CACHED = replace(CAPACITY, prefix_interval=256, prefix_rows=60, row_bytes=8, page_bytes=8)
TIMES = StepTimes(decode=DECODE, prompts=PromptTimes.affine(0.01, 1e-4), position=0.0, byte=0.0)
ENGINE = EngineModel(capacity=CAPACITY, times=TIMES, overlap=True, pacing=lambda: None)
run = partial(Cluster, ENGINE)


def poisson(rate: float, requests: int, turns: int = 1) -> list[Arrival]:
    prompt, output = Lengths(mean=100), Lengths(mean=40)
    return Poisson(rate=rate, requests=requests, prompt=prompt, output=output, turns=turns, think=20.0).draw()


def test_replicas_share_a_load_and_every_request_is_answered() -> None:
    load = poisson(60.0, 600)
    one, three = (run(ClusterPlan(replicas=n)).serve(load) for n in (1, 3))
    assert all(not j.failed and j.first > j.arrival.at and j.end >= j.first for j in (*one.jobs, *three.jobs))
    assert three.seconds < one.seconds and three.replica_seconds == pytest.approx(3 * three.seconds)
    figures = summary(three, Slo(ttft=0.5))
    assert figures["gpu_hours_per_million_tokens"] == pytest.approx(
        1e6 * three.replica_seconds / 3600 / sum(a.output for a in load)
    )
    assert figures["slo"]["met"] == sum(j.first - j.arrival.at <= 0.5 for j in three.jobs) / 600


def test_sessions_stay_where_their_prefix_is() -> None:
    load = poisson(12.0, 240, turns=6)
    load = [a for a in load if a.prompt + a.output <= 2048]
    cached = replace(ENGINE, capacity=CACHED)
    by = {
        router: Cluster(cached, ClusterPlan(replicas=4, router=router)).serve(load)
        for router in ("prefix", "round-robin")
    }
    hits = {router: sum(j.cached for j in o.jobs) / sum(a.prompt for a in load) for router, o in by.items()}
    assert hits["prefix"] > 0.6 > 0.5 > hits["round-robin"]


def test_a_failed_replica_loses_streams_and_nothing_hangs() -> None:
    load = poisson(40.0, 800)
    failures = Failures(mtbf_s=3.0, restart_s=2.0, seed=1)
    o = run(ClusterPlan(replicas=3, failures=failures)).serve(load)
    assert o.failures > 3 and all(j.end >= j.arrival.at for j in o.jobs)
    lost, retried = [j for j in o.jobs if j.failed], [j for j in o.jobs if j.tries > 1 and not j.failed]
    assert lost and {j.failed for j in lost} == {"error"} and retried
    assert all(j.first >= 0 or j.tries > 1 for j in lost)  # it had begun to answer, or was given up after retries
    assert o.replica_seconds < 3 * o.seconds


def test_with_no_replica_left_requests_wait_for_the_next() -> None:
    load = [Arrival(0.0, 100, 500), Arrival(3.0, 10, 5)]
    o = run(ClusterPlan(replicas=1, failures=Failures(mtbf_s=1e-9, restart_s=1e5, seed=1))).serve(load[:1])
    assert [j.failed for j in o.jobs] == ["error"] and o.jobs[0].tries == 3


def test_autoscaling_follows_the_load() -> None:
    busy, quiet = poisson(60.0, 1200), [Arrival(60 + 5.0 * i, 20, 5) for i in range(40)]
    rule = Autoscale(least=1, most=6, target=8, interval_s=1.0, start_s=2.0, down_after_s=20.0)
    o = run(ClusterPlan(replicas=1, autoscale=rule)).serve([*busy, *quiet])
    assert 3 < o.most_replicas <= 6 and o.scale[-1][1] == 1 and not any(j.failed for j in o.jobs)
    assert o.replica_seconds < 0.6 * o.most_replicas * o.seconds
    assert o.seconds > 255  # the last request's end, and no later event


def test_the_fewest_replicas_are_enough_and_one_less_is_not() -> None:
    load, slo = poisson(100.0, 1000), Slo(ttft=0.2, tpot=0.02)

    def share(o: Outcome) -> float:
        return sum(map(slo.met, o.jobs)) / len(o.jobs)

    n, outcome, tried = fewest(ENGINE, ClusterPlan(replicas=1), load, slo, 0.95)
    assert n > 1 and share(outcome) >= 0.95 > share(run(ClusterPlan(replicas=n - 1)).serve(load))
    assert {t.replicas: t.met for t in tried}[n] and not {t.replicas: t.met for t in tried}[n - 1]
    with pytest.raises(JetExportError, match=r"do not meet ttft 0\.01 ms"):
        fewest(ENGINE, ClusterPlan(replicas=1), load[:20], Slo(ttft=1e-5), 0.95)


def test_slo_is_read() -> None:
    assert parse_slo("ttft=500ms,tpot=30ms") == Slo(ttft=0.5, tpot=0.03) and parse_slo("e2e=2s") == Slo(e2e=2.0)
    for bad in ("ttft=500", "ttfft=1s", "ttft", "ttft=-1s", ""):
        with pytest.raises(JetExportError, match="not a list of times"):
            parse_slo(bad)
