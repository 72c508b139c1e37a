"""Beam search, uniform placement, rank correlation."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jet_export.postnas.beam import beam_search, greedy, rank_correlation, uniform


def test_a_wide_beam_finds_the_best_of_all_placements() -> None:
    """Of a value in which layers 1 and 4 are good together only."""

    def value(p: tuple[int, ...]) -> tuple[float, ...]:
        return (sum((3, 1, 4, 1.5, 0)[i] for i in p) + 10 * (1 in p and 4 in p),)

    rounds: list[int] = []

    def worth(placements: list[tuple[int, ...]]) -> list[tuple[float, ...]]:
        rounds.append(len(placements))
        return [value(p) for p in placements]

    found = beam_search(5, 3, 10, worth)
    for k, best in enumerate(found):
        assert best == max(itertools.combinations(range(5), k), key=value)
    assert found == [(), (2,), (1, 4), (1, 2, 4)] and rounds == [5, 10, 10]
    assert beam_search(5, 2, 1, worth)[2] == (0, 2)  # a narrow one does not


def test_ties_go_to_lower_layers_and_to_the_second_value() -> None:
    assert beam_search(4, 2, 2, lambda ps: [(0.0,)] * len(ps)) == [(), (0,), (0, 1)]
    assert beam_search(4, 1, 2, lambda ps: [(0.0, float(p[0])) for p in ps])[1] == (3,)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_uniform_placement_is_even(case: tuple[int, int]) -> None:
    layers, keep = case
    placed = uniform(layers, keep)
    assert len(set(placed)) == keep and list(placed) == sorted(placed)
    assert all(0 <= i < layers for i in placed)
    gaps = {b - a for a, b in itertools.pairwise(placed)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_greedy_and_ranks() -> None:
    assert greedy([0.1, 0.5, 0.5, 0.2], 2) == (1, 2) and greedy([1.0], 0) == ()
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 45]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert rank_correlation([1, 1], [1, 2]) is None and rank_correlation([], []) is None
