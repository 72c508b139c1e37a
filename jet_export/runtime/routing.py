"""Which replica gets a request: one that holds its session or a prefix of its prompt, else the least loaded.

Plain Python, shared by the simulator and by the server over several replicas. Loads are requests that a replica has
been given and has not ended. A replica that holds a prefix is passed over while it has `slack` requests more than the
least loaded one: then another computes the prefix again and holds it too. Ties go to the first in the caller's order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from jet_export.utils.errors import JetExportError

POLICIES = ("prefix", "least", "round-robin")
SLACK = 8  # requests
REMEMBERED = 1 << 18  # sessions and prefixes, each

R = TypeVar("R", bound=Hashable)
K = TypeVar("K", bound=Hashable)


class Router(Generic[R]):
    """Remembers which replica has which sessions and prefixes, the most recently used of them. Not thread-safe."""

    def __init__(self, policy: str = "prefix", *, slack: int = SLACK, remembered: int = REMEMBERED) -> None:
        if policy not in POLICIES:
            raise JetExportError(f"router {policy!r} is not known.", f"Known: {', '.join(POLICIES)}.")
        self.policy, self.slack, self.remembered = policy, slack, remembered
        self.sessions: OrderedDict[str, R] = OrderedDict()
        self.prefixes: OrderedDict[Hashable, R] = OrderedDict()
        self.turn = 0

    def choose(
        self, loads: Mapping[R, int], session: str = "", prefixes: Sequence[Hashable] = (), least: R | None = None
    ) -> R:
        """The replica for a request. `loads`: of those that take requests, at least one; `prefixes`: chained hashes of
        the prompt's pages, from its beginning (prefix.page_hashes); `least`: the first with the lowest load, if the
        caller knows it."""
        if self.policy == "round-robin":
            self.turn += 1
            return list(loads)[self.turn % len(loads)]
        if least is None:
            least = min(loads, key=loads.__getitem__)
        if self.policy == "least":
            return least
        held = self._holder(loads, session, prefixes)
        chosen = held if held is not None and loads[held] - loads[least] < self.slack else least
        if session:
            self._remember(self.sessions, session, chosen)
        for prefix in prefixes:
            self._remember(self.prefixes, prefix, chosen)
        return chosen

    def forget(self, replica: R) -> None:
        """The replica is gone, and what it held."""
        for session in [s for s, r in self.sessions.items() if r == replica]:
            del self.sessions[session]
        for prefix in [p for p, r in self.prefixes.items() if r == replica]:
            del self.prefixes[prefix]

    def _holder(self, loads: Mapping[R, int], session: str, prefixes: Sequence[Hashable]) -> R | None:
        found = self.sessions.get(session) if session else None
        if found is not None and found in loads:
            return found
        for prefix in reversed(prefixes):
            found = self.prefixes.get(prefix)
            if found is not None and found in loads:
                return found
        return None

    def _remember(self, known: OrderedDict[K, R], key: K, replica: R) -> None:
        known[key] = replica
        known.move_to_end(key)
        if len(known) > self.remembered:
            known.popitem(last=False)
