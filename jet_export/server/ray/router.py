"""Ray Serve's request router by prefix: runtime/routing.py over the calls that this process has sent."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from jet_export.runtime.routing import POLICIES, SLACK, Router
from jet_export.server.ray.call import Call

MOST_ON_THE_WAY = 64  # calls at one moment; more are forgotten, the oldest first
REMEMBERED = 4096  # calls, of which the replicas that had them are known


class PrefixRouter(RequestRouter):
    """A replica that has as many calls as it takes is passed over for the others, the least loaded first.

    Calls that have been given a replica and are on their way count as its own: many may be routed at one moment. A call
    that is sent again goes to a replica that has not had it, if there is one.
    """

    def initialize_state(self, policy: str = POLICIES[0], slack: int = SLACK, **_: Any) -> None:
        self.router: Router[str] = Router(policy, slack=slack)
        self.running: set[tuple[str, str]] = set()  # (Ray's id of a call, replica)
        self.ended: OrderedDict[tuple[str, str], None] = OrderedDict()  # calls that Ray has not said to be routed
        self.loads: Counter[str] = Counter()  # of `running`, by replica
        self.on_the_way: OrderedDict[str, str] = OrderedDict()  # Ray's id of a call -> replica
        self.had: OrderedDict[int, set[str]] = OrderedDict()  # number of a call -> replicas

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {r.replica_id.unique_id: r for r in candidate_replicas}
        if not by_name:
            return []
        name = pending_request.metadata.internal_request_id if pending_request is not None else ""
        self.on_the_way.pop(name, None)
        waiting = Counter(self.on_the_way.values())
        loads = {r: self.loads[r] + waiting[r] for r in by_name}
        call = _call(pending_request)
        had = self.had.get(call.number, set()) if call else set()
        fresh = {r: n for r, n in loads.items() if r not in had} or loads
        chosen = self.router.choose(fresh, prefixes=call.prefixes if call else ())
        self.on_the_way[name] = chosen
        if len(self.on_the_way) > MOST_ON_THE_WAY:  # of a call that was cancelled before it arrived
            self.on_the_way.popitem(last=False)
        others = sorted((r for r in by_name if r != chosen), key=lambda r: (r in had, loads[r]))
        return [[by_name[r]] for r in (chosen, *others)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        name = pending_request.metadata.internal_request_id
        self.on_the_way.pop(name, None)
        key = (name, replica_id.unique_id)
        if key in self.ended:  # a short call may have ended before Ray comes to say this
            del self.ended[key]
        elif key not in self.running:
            self.running.add(key)
            self.loads[replica_id.unique_id] += 1
        if call := _call(pending_request):
            self.had.setdefault(call.number, set()).add(replica_id.unique_id)
            if len(self.had) > REMEMBERED:
                self.had.popitem(last=False)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Ray says so too of calls that a replica has rejected, which are never said to be routed."""
        key = (internal_request_id, replica_id.unique_id)
        if key in self.running:
            self.running.discard(key)
            self.loads[replica_id.unique_id] -= 1
            return
        self.ended[key] = None
        if len(self.ended) > REMEMBERED:
            self.ended.popitem(last=False)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.router.forget(replica_id.unique_id)


def _call(pending_request: PendingRequest | None) -> Call | None:
    args = pending_request.args if pending_request is not None else ()
    return args[0] if args and isinstance(args[0], Call) else None
