"""Values between those that were measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter


def interpolated(known: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x: linear between the known (x, value), which ascend; beyond them, that of the nearest."""
    at = bisect_left(known, x, key=itemgetter(0))
    if at == 0 or at == len(known):
        return known[min(at, len(known) - 1)][1]
    (low, below), (high, above) = known[at - 1], known[at]
    return below + (x - low) / (high - low) * (above - below)
