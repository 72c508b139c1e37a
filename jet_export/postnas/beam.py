"""Placements of attention layers: beam search, uniform spacing, and rank correlation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Placement = tuple[int, ...]  # layers that keep their attention, in order
Worth = tuple[float, ...]  # larger is better; later entries break ties


def beam_search(layers: int, most: int, width: int, worth: Callable[[list[Placement]], list[Worth]]) -> list[Placement]:
    """The best placement found of 0, 1, ..., most attention layers. Each round adds every other layer to each of the
    `width` best placements of the round before; `worth` is asked once a round. Ties: the lower layers."""
    beam: list[Placement] = [()]
    found = list(beam)
    for _ in range(most):
        grown = sorted({tuple(sorted((*p, i))) for p in beam for i in range(layers) if i not in p})
        worths = dict(zip(grown, worth(grown), strict=True))
        beam = sorted(grown, key=lambda p: (tuple(-x for x in worths[p]), p))[:width]
        found.append(beam[0])
    return found


def uniform(layers: int, keep: int) -> Placement:
    """`keep` layers evenly spaced, each in the middle of its share: 2 of 12 are layers 3 and 9."""
    return tuple((2 * i + 1) * layers // (2 * keep) for i in range(keep))


def greedy(values: Sequence[float], keep: int) -> Placement:
    """The `keep` layers of the largest values; ties: the lower layer."""
    return tuple(sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for ties; None where one of them is constant or there are fewer than two."""
    a, b = _ranks(x), _ranks(y)
    n = len(a)
    if n < 2 or n != len(b):
        return None
    mean = (n + 1) / 2
    cov = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    spread = sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b)
    return cov / spread**0.5 if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(v) + (order.count(v) + 1) / 2 for v in values]
