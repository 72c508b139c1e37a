"""How likely drafts are to be accepted, learned from what became of those before.

Drafted tokens are taken to be right independently, with one probability for a sequence and kind of draft: of k drafted
tokens 1 to a are accepted with probability rate^a. The estimate is a ratio of decayed counts that starts from what all
sequences together have seen, so that a new one does not begin from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

DECAY = 0.9  # of a sequence's counts, an observation
SHARED_DECAY = 0.99
PRIOR, WEIGHT = 0.5, 2.0  # of the shared estimate: a guess, and how many observed tokens it counts as


def matched(draft: Sequence[int], tokens: Sequence[int]) -> int:
    """How many leading tokens of a draft are those that were sampled."""
    n = 0
    for drafted, token in zip(draft, tokens, strict=False):
        if drafted != token:
            break
        n += 1
    return n


class Estimate:
    """A rate from decayed counts."""

    def __init__(self, decay: float, prior: Estimate | None = None) -> None:
        self.decay, self.prior = decay, prior
        self.accepted = self.tested = 0.0

    @property
    def rate(self) -> float:
        before = PRIOR if self.prior is None else self.prior.rate
        return (self.accepted + WEIGHT * before) / (self.tested + WEIGHT)

    def observe(self, accepted: int, tested: int) -> None:
        """Of a draft, `tested` tokens were compared with sampled ones, up to the first that was wrong."""
        self.accepted = self.decay * self.accepted + accepted
        self.tested = self.decay * self.tested + tested


class Acceptance:
    """The estimates of all sequences together, by the kind of draft."""

    def __init__(self) -> None:
        self.shared: dict[int, Estimate] = {}

    def of_sequence(self) -> SequenceAcceptance:
        return SequenceAcceptance(self)

    def kind(self, kind: int) -> Estimate:
        if kind not in self.shared:
            self.shared[kind] = Estimate(SHARED_DECAY)
        return self.shared[kind]


class SequenceAcceptance:
    """The estimates of one sequence."""

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self.own: dict[int, Estimate] = {}

    def rate(self, kind: int) -> float:
        return (self.own.get(kind) or self.acceptance.kind(kind)).rate

    def observe(self, kind: int, draft: Sequence[int], tokens: Sequence[int]) -> None:
        """`tokens` were sampled where `draft` was expected; as much of both as there is counts."""
        accepted, seen = matched(draft, tokens), min(len(draft), len(tokens))
        tested = min(seen, accepted + 1)
        shared = self.acceptance.kind(kind)
        if kind not in self.own:
            self.own[kind] = Estimate(DECAY, shared)
        self.own[kind].observe(accepted, tested)
        shared.observe(accepted, tested)


@dataclass
class DraftCounts:
    """What has become of drafts so far, by the position in the draft."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int) -> None:
        for counts, n in ((self.drafted, drafted), (self.accepted, accepted)):
            if len(counts) < drafted:
                counts += [0] * (drafted - len(counts))
            for i in range(n):
                counts[i] += 1
