"""Ray Serve's request router by prefix: runtime/routing.py over the calls that this process has sent."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from jet_export.runtime.routing import POLICIES, SLACK, Router
from jet_export.server.ray.call import Call


class PrefixRouter(RequestRouter):
    """A replica that has as many calls as it takes is passed over for the others, the least loaded first."""

    def initialize_state(self, policy: str = POLICIES[0], slack: int = SLACK, **_: Any) -> None:
        self.router: Router[str] = Router(policy, slack=slack)
        self.loads: Counter[str] = Counter()  # replica -> calls

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {r.replica_id.unique_id: r for r in candidate_replicas}
        if not by_name:
            return []
        loads = {name: self.loads[name] for name in by_name}
        args = pending_request.args if pending_request is not None else ()
        prefixes = args[0].prefixes if args and isinstance(args[0], Call) else ()
        chosen = self.router.choose(loads, prefixes=prefixes)
        others = sorted((name for name in by_name if name != chosen), key=loads.__getitem__)
        return [[by_name[name]] for name in (chosen, *others)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self.loads[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.loads[replica_id.unique_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.loads.pop(replica_id.unique_id, None)
        self.router.forget(replica_id.unique_id)
