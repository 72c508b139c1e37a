"""How many replicas a load needs: by the requests that each has, and by the KV pages that these hold.

Ray Serve's custom policy: it calls `policy` and applies the bounds and delays itself. Few long requests may fill a
replica's pages long before they fill its slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KV_USED = (
    "kv_used"  # what Engine.record_autoscaling_stats reports: the share of a replica's KV pages that requests hold
)
KV_AT = 0.8  # of the pages, on average


def replicas_for(requests: float, kv_used: Iterable[float], target_requests: float) -> float:
    """So many that each has `target_requests`, and KV_AT of its pages in use. `kv_used`: of each that is there."""
    return max(requests / target_requests, sum(kv_used) / KV_AT)


def policy(context: Any) -> tuple[float, dict[str, Any]]:
    """`context`: ray.serve.config.AutoscalingContext."""
    kv_used = (context.aggregated_metrics or {}).get(KV_USED, {})
    target = context.config.get_target_ongoing_requests()
    return replicas_for(context.total_num_requests, kv_used.values(), target), {}
