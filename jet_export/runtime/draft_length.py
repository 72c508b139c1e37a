"""How many tokens to draft for each sequence of a step: as many as pay, by the times of the steps so far.

A step in which a sequence has k drafted tokens gives it 1 + rate + ... + rate^k tokens on average. Token k of a draft
is worth rate^k: those worth less than some threshold are left out, and the threshold is the one with the most expected
tokens a second, among a few; 1 leaves all of them out, which is a plain step. What a step takes is remembered by its
number of sequences and of drafted tokens, both to a factor of two. A size that has not been seen is taken to cost what
the next smaller one does, so that it is tried once; what has not been seen for long is forgotten, so that it is tried
again. A plain step is measured first. Estimates are wrong at first, and where drafts are as often right as not but a
step with them is dear, a few tries are a lot: what drafts have lost against plain steps is therefore accounted for
(draft_budget.py), and while the budget is spent there are none.

Looking for drafts takes the host's time, which a plain step may wait for. So the plain steps that all is compared with
are some in which nothing looks, and how much longer others take is paid from the budget too.

Beside prompts sequences decode at little cost, in the prompts' call, while drafts take a call of their own: there the
tokens must be worth the time of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jet_export.runtime.draft_budget import DraftBudget

THRESHOLDS = (0.7, 0.5, 0.3, 0.15, 0.05)
GAIN = 1.03  # drafts must promise so many times the tokens a second of a plain step
NEW = 0.2  # weight of a new time in a mean
FINE = 256  # parts in which rates are told apart
KEEP = 1024  # steps after which a time is forgotten
LOOKED = 16  # plain steps with a look for drafts, behind which there is one without


@dataclass(frozen=True)
class Candidate:
    """A sequence that could have a draft."""

    most: int  # tokens that it could have
    rate: float  # probability that one is right, if those before are


@dataclass
class Cell:
    """The time of steps of one size."""

    seconds: float
    at: int  # the step that was the last of this size


class StepTimes:
    """Seconds of steps by size."""

    def __init__(self) -> None:
        self.cells: dict[tuple[int, int], Cell | None] = {}  # None: seen once, and that was not the usual time
        self.steps = 0

    def skip(self) -> None:
        """A step whose time is not that of its size."""
        self.steps += 1

    def observe(self, rows: int, drafted: int, seconds: float) -> None:
        self.steps += 1
        key = size(rows, drafted)
        if key not in self.cells:  # kernels may have been compiled or a graph captured: the first time does not count
            self.cells[key] = None
            return
        cell = self._fresh(key)
        mean = seconds if cell is None else cell.seconds + NEW * (seconds - cell.seconds)
        self.cells[key] = Cell(mean, self.steps)

    def seconds(self, rows: int, drafted: int) -> float | None:
        """Of such a step, or of the next smaller size that is known; None if not even the plain step is."""
        most, least = size(rows, drafted), size(rows, 0)
        if self._fresh(least) is None:
            return None
        return next(cell.seconds for i in range(most[1], -1, -1) if (cell := self._fresh((most[0], i))) is not None)

    def is_new(self, rows: int, drafted: int) -> bool:
        """No step of this size has been seen."""
        return size(rows, drafted) not in self.cells

    def _fresh(self, key: tuple[int, int]) -> Cell | None:
        cell = self.cells.get(key)
        return cell if cell is not None and self.steps - cell.at < KEEP else None


def size(rows: int, drafted: int) -> tuple[int, int]:
    """Of a step: the sequences that decode and the drafted tokens, to a factor of two."""
    return rows.bit_length(), drafted.bit_length()


class DraftLengths:
    """Not thread-safe: only the thread that takes the steps calls it.

    `fixed`: every draft is as long as it can be, whatever it costs, so that a request's steps do not depend on times.
    """

    def __init__(self, *, fixed: bool = False) -> None:
        self.fixed = fixed
        self.times = StepTimes()
        self.mixed = StepTimes()  # of steps with prompts and without drafts, by the tokens of the prompts
        self.budget = DraftBudget()
        self.looked: dict[int, int] = {}  # sequences, to a factor of two -> plain steps since one without a look

    def may_look(self, rows: int) -> bool:
        """Whether to look for drafts of the next step: there is budget, and no time of a plain step to take."""
        return self.fixed or (self.budget.is_open and self.looked.get(rows.bit_length(), 0) < LOOKED)

    def choose(self, candidates: Sequence[Candidate], rows: int, prompt_tokens: int = 0) -> list[int]:
        """Tokens to draft for each candidate, 0 for none, in a step in which `rows` sequences decode."""
        if self.fixed:
            return [c.most for c in candidates]
        best, nothing, beside = self._plain(rows), [0] * len(candidates), 0.0
        if prompt_tokens and best is not None:
            seconds = self.mixed.seconds(prompt_tokens, 0)
            best, beside = (None, 0.0) if seconds is None else (rows / seconds, seconds)
        if best is None or not self.budget.is_open or not any(c.most for c in candidates):
            return nothing
        chosen, best = nothing, best * GAIN
        plans = [drafts_of(c.most, round(c.rate * FINE)) for c in candidates]
        for i in range(len(THRESHOLDS)):
            lengths = [plan[i][0] for plan in plans]
            seconds = self.times.seconds(rows, sum(lengths))
            if seconds is None or not any(lengths):
                continue
            tokens = rows + sum(plan[i][1] for plan in plans)
            if tokens / (seconds + beside) > best:
                chosen, best = lengths, tokens / (seconds + beside)
        return chosen

    def could_pay(self, rows: int, most: int) -> bool:
        """Whether a draft of up to `most` tokens for every sequence could, if all were right."""
        if self.fixed:
            return True
        plain = self._plain(rows)
        if plain is None:
            return False
        lengths = {1, most // 2, most} - {0}
        return any((rows * (1 + n)) / (self.times.seconds(rows, rows * n) or 1.0) > plain for n in lengths)

    def _plain(self, rows: int) -> float | None:
        """Tokens a second of a plain step."""
        seconds = self.times.seconds(rows, 0)
        return None if seconds is None else rows / max(seconds, 1e-9)

    def observe(
        self,
        rows: int,
        drafted: int,
        seconds: float,
        prompt_tokens: int = 0,
        accepted: int = 0,
        looked: float = 0.0,
    ) -> None:
        """A step of `rows` sequences took so long, the making of its drafts included; so many of the drafted tokens
        were accepted. `looked`: seconds of it in which the host looked for drafts, of this step or the next."""
        plain = self.mixed.seconds(prompt_tokens, 0) if prompt_tokens else self.times.seconds(rows, 0)
        if not drafted:
            self._plain_step(rows, seconds, prompt_tokens, looked, plain)
            return
        if plain is not None:
            lost = seconds / max(plain, 1e-9) - (rows + accepted) / rows
            self.budget.drafted_step(lost, not prompt_tokens and self.times.is_new(rows, drafted))
        if not prompt_tokens:
            self.times.observe(rows, drafted, seconds)

    def _plain_step(self, rows: int, seconds: float, prompt_tokens: int, looked: float, plain: float | None) -> None:
        """`plain`: seconds that such a step takes without a look."""
        self.budget.plain_step()
        key = rows.bit_length()
        if prompt_tokens:
            self.mixed.observe(prompt_tokens, 0, seconds)
        elif looked and plain is not None:
            self.looked[key] = self.looked.get(key, 0) + 1
            self.times.skip()
            most = looked / max(plain, 1e-9)  # what else has made the step longer is none of the look's
            self.budget.looked(min(max(seconds / max(plain, 1e-9) - 1, -most), most))
        else:
            self.looked[key] = 0
            self.times.observe(rows, 0, seconds)


@lru_cache(maxsize=1 << 14)
def drafts_of(most: int, rate: int) -> tuple[tuple[int, float], ...]:
    """Of a draft of at most so many tokens, each right with probability rate / FINE if those before are: for each of
    THRESHOLDS, how many are accepted with at least this probability, and what they give on average."""
    p = rate / FINE
    found = []
    for threshold in THRESHOLDS:
        n = sum(p**k >= threshold for k in range(1, most + 1))
        found.append((n, expected(p, n)))
    return tuple(found)


def expected(rate: float, n: int) -> float:
    """Accepted tokens of n drafted ones, on average."""
    total, likely = 0.0, 1.0
    for _ in range(n):
        likely *= rate
        total += likely
    return total
