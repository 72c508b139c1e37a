"""How many requests each replica has, and which has the fewest, without a look at all of them."""

from __future__ import annotations

import heapq


class Loads(dict[int, int]):
    """Replica -> requests. Replicas are numbered in the order in which they come."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, int]] = []  # (requests, replica): all that are so, and some that were

    def __setitem__(self, replica: int, requests: int) -> None:
        super().__setitem__(replica, requests)
        if len(self._heap) > 8 * len(self):
            self._heap = [(n, r) for r, n in self.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (requests, replica))

    def least(self) -> int:
        """The replica with the fewest requests, of several the first. There must be one."""
        heap = self._heap
        while self.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][1]
