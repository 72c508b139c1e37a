"""What drafts may cost where they do not pay: a share of the time of plain decoding, and no more.

The unit is a plain step. A step with drafts takes from the budget what it took beyond the plain steps in which its
tokens would have come, or adds what it gained. A plain step that was longer because the host looked for drafts takes
that. Each plain step adds SHARE, up to START. Without budget there are no drafts, and nothing looks for them. So with
drafts n plain steps' time costs at most SHARE n + START plain steps more than without, and the step that overdrew the
budget; drafts that have paid may lose again what they gained, up to MOST.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.02
START, MOST = 3.0, 32.0
FIRST, WORST = 2.0, 16.0  # most that a step takes away: the first of its size (a graph may be captured), and any


@dataclass
class DraftBudget:
    """Not thread-safe. `left`: plain steps that may be lost."""

    left: float = START

    @property
    def is_open(self) -> bool:
        return self.left > 0

    def plain_step(self) -> None:
        if self.left < START:
            self.left += SHARE

    def drafted_step(self, lost: float, first: bool) -> None:
        """`lost`: plain steps, negative where the step has gained some; `first`: no step of its size was seen
        before."""
        self.left = min(max(self.left - min(lost, FIRST if first else WORST), -WORST), MOST)

    def looked(self, lost: float) -> None:
        """A plain step took so many plain steps longer for a look; by chance it may be negative."""
        self.left = max(min(self.left - min(lost, WORST), max(self.left, START)), -WORST)
