"""How many replicas: by requests or by KV pages, whichever needs more."""

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.serving import async_llm

from jet_export.runtime.params import Params
from jet_export.server.ray.autoscaling import KV_AT, KV_USED, policy, replicas_for
from jet_export.server.ray.engine import EngineReplica


@pytest.mark.parametrize(
    ("requests", "kv_used", "replicas"),
    [
        (0, [], 0),
        (48, [0.1], 2),  # many short ones
        (3, [KV_AT, KV_AT], 2),  # just right
        (3, [1.0, 1.0, 1.0], 3 / KV_AT),  # few that hold all
        (96, [0.2, 0.2], 4),
    ],
)
def test_the_scarcer_of_both_decides(requests: float, kv_used: list[float], replicas: float) -> None:
    assert replicas_for(requests, kv_used, 24) == pytest.approx(replicas)


@pytest.mark.parametrize("metrics", [None, {}, {"other": {"a": 9.0}}, {KV_USED: {"a": 0.4, "b": 2 * KV_AT}}])
def test_the_policy_does_without_reports(metrics: Any) -> None:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 10)
    context = SimpleNamespace(aggregated_metrics=metrics, config=config, total_num_requests=15)
    wanted, state = policy(context)
    assert state == {} and wanted == pytest.approx(2 + 0.4 / KV_AT if metrics and KV_USED in metrics else 1.5)


def test_a_replica_reports_the_pages_that_requests_hold() -> None:
    llm = async_llm()  # not started: its requests stay
    replica = EngineReplica.__new__(EngineReplica)
    replica.llm = llm
    assert replica.kv_used() == 0
    llm.batching.submit([1] * 40, Params(max_new_tokens=9), lambda output: None)
    llm.batching.step()
    one = replica.kv_used()
    llm.batching.submit([2] * 40, Params(max_new_tokens=9), lambda output: None)
    llm.batching.step()
    assert 0 < one <= 0.5 and replica.kv_used() == pytest.approx(2 * one)
    while llm.batching.sequences:
        llm.batching.step()
    assert replica.kv_used() == 0
