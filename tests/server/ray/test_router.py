"""Ray Serve's interface over runtime/routing.py: calls on their way count, and what was lost goes elsewhere."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from jet_export.runtime.params import Params
from jet_export.server.ray.call import Call
from jet_export.server.ray.router import PrefixRouter


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def request(number: int, *prefixes: bytes, name: str = "") -> Any:
    call = Call(number=number, prompts=[[1]], params=Params(), prefixes=prefixes)
    return SimpleNamespace(args=[call], metadata=SimpleNamespace(internal_request_id=name or f"r{number}"))


A, B = replica("a"), replica("b")


def router() -> PrefixRouter:
    made = PrefixRouter.__new__(PrefixRouter)
    made.initialize_state(slack=4)
    return made


def choose(made: PrefixRouter, pending: Any, *replicas: Any) -> str:
    ranks = asyncio.run(made.choose_replicas(list(replicas or (A, B)), pending))
    assert len(ranks) == len(replicas or (A, B))  # the others are next, should it not take the call
    return ranks[0][0].replica_id.unique_id


def test_calls_on_their_way_and_calls_that_run_count() -> None:
    made = router()
    assert [choose(made, request(i)) for i in range(4)] == ["a", "b", "a", "b"]
    for i, r in enumerate((A, B, A, B)):
        made.on_request_routed(request(i), r.replica_id, None)
    assert not made.on_the_way and made.loads == {"a": 2, "b": 2}
    made.on_request_completed(B.replica_id, "r1")
    assert choose(made, request(5)) == "b"


def test_a_call_that_is_rejected_never_ran() -> None:
    """Ray says that it has ended, and not that it was routed."""
    made = router()
    for i, r in enumerate((A, B)):
        assert choose(made, request(i)) == r.replica_id.unique_id
        made.on_request_routed(request(i), r.replica_id, None)
    for i in range(2, 6):
        made.on_request_completed(A.replica_id, f"r{i}")
    assert [choose(made, request(i)) for i in range(6, 10)] == ["a", "b", "a", "b"]


def test_a_call_that_has_ended_before_it_is_said_to_be_routed_does_not_run() -> None:
    made = router()
    for i in range(4):
        assert choose(made, request(i)) == "a"
        made.on_request_completed(A.replica_id, f"r{i}")
        made.on_request_routed(request(i), A.replica_id, None)
    assert not made.running and not made.ended and made.loads["a"] == 0


def test_a_prefix_stays_and_no_call_is_lost_twice_to_one_replica() -> None:
    made = router()
    first = request(1, b"p")
    assert choose(made, first) == "a"
    made.on_request_routed(first, A.replica_id, None)
    assert choose(made, request(2, b"p", b"q")) == "a"
    made.on_request_completed(A.replica_id, "r1")  # it was lost
    assert choose(made, request(1, b"p", name="again")) == "b"
    assert choose(made, request(1, b"p", name="once more"), A) == "a"  # there is no other


def test_without_replicas_there_is_no_choice() -> None:
    assert asyncio.run(router().choose_replicas([], request(1))) == []
