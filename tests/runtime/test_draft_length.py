"""The length of drafts: it follows what is accepted and what steps cost, and never costs more than a few percent."""

import random
from collections.abc import Callable

import pytest

from jet_export.runtime.acceptance import Acceptance, matched
from jet_export.runtime.draft_length import KEEP, Candidate, DraftLengths, StepTimes, expected

Cost = Callable[[int, int], float]  # (sequences, drafted tokens) -> seconds


def free(rows: int, drafted: int) -> float:
    """A step reads the weights, whatever the number of tokens."""
    return 1.0


def dear(rows: int, drafted: int) -> float:
    """Every token costs the same."""
    return rows + drafted


def launched(rows: int, drafted: int) -> float:
    """A verification costs a third more than a plain step, and each token a little."""
    return 1.0 + 0.33 * (drafted > 0) + 0.02 * drafted


def threefold(rows: int, drafted: int) -> float:
    """A verification costs three plain steps."""
    return 1.0 + 2.0 * (drafted > 0)


def speed(cost: Cost, rate: float, rows: int, steps: int = 800, most: int = 7) -> float:
    """Tokens a second, against plain steps, of sequences whose drafted tokens are right with probability `rate`."""
    rng, lengths, acceptance = random.Random(0), DraftLengths(), Acceptance()
    own = [acceptance.of_sequence() for _ in range(rows)]
    tokens = seconds = 0.0
    for _ in range(steps):
        drafts = lengths.choose([Candidate(most, a.rate(0)) for a in own], rows)
        accepted = 0
        for a, n in zip(own, drafts, strict=True):
            right = next((i for i in range(n) if rng.random() > rate), n)
            tokens, accepted = tokens + 1 + right, accepted + right
            seen = [0] * right + [1] if n else [int(rng.random() > rate)]  # lookups are compared in plain steps too
            a.observe(0, [0] * max(n, 1), seen)
        took = cost(rows, sum(drafts))
        seconds += took
        lengths.observe(rows, sum(drafts), took * rng.uniform(0.95, 1.05), accepted=accepted)
    return (tokens / seconds) / (rows / cost(rows, 0))


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("cost", [free, dear, launched, threefold])
def test_it_is_never_much_slower_than_plain(cost: Cost, rate: float, rows: int) -> None:
    assert speed(cost, rate, rows) > 0.97


@pytest.mark.parametrize("rows", [1, 6])
def test_it_is_nearly_as_fast_as_the_best_fixed_length(rows: int) -> None:
    for cost, rate in ((free, 0.8), (free, 0.4), (launched, 0.8)):
        best = max((1 + expected(rate, n)) * cost(rows, 0) / cost(rows, rows * n) for n in range(8))
        assert speed(cost, rate, rows) > 0.9 * best


def test_sequences_that_accept_little_have_no_drafts_beside_others_that_do() -> None:
    lengths = DraftLengths()
    for drafted in (0, 0, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16):
        lengths.observe(4, drafted, launched(4, drafted), accepted=drafted)
    good, bad = Candidate(4, 0.95), Candidate(4, 0.01)
    assert lengths.choose([good, bad, good, bad], 4) == [4, 0, 4, 0]


def test_it_falls_to_nothing_where_it_does_not_pay_and_comes_back() -> None:
    lengths, sure = DraftLengths(), [Candidate(4, 0.9)] * 8
    for _ in range(2):
        lengths.observe(8, 0, 1.0)
    tries = 0
    while (drafts := lengths.choose(sure, 8)) != [0] * 8:
        lengths.observe(8, sum(drafts), 9.0)
        tries += 1
    assert 0 < tries <= 12
    for _ in range(KEEP):
        lengths.observe(8, 0, 1.0)
    assert any(lengths.choose(sure, 8))


def test_where_even_drafts_that_are_all_right_do_not_pay_none_are_looked_for() -> None:
    lengths = DraftLengths()
    assert not lengths.could_pay(8, 4)  # a plain step is measured first
    for drafted, seconds in ((0, 1.0), (8, 1.0), (16, 9.0)):
        for _ in range(2):
            lengths.observe(8, drafted, seconds)
        assert lengths.could_pay(8, 4)  # one token each
    lengths.observe(8, 8, 100.0)
    assert not lengths.could_pay(8, 4)


def test_times_are_of_sizes_and_the_next_smaller_one_stands_in() -> None:
    times = StepTimes()
    assert times.seconds(4, 0) is None
    for n, seconds in ((0, 1.0), (4, 2.0)):
        times.observe(5, n, 100.0)  # the first of a size does not count
        times.observe(5, n, seconds)
    assert [times.seconds(4, n) for n in (0, 3, 4, 7, 100)] == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert times.seconds(8, 4) is None


def test_beside_prompts_drafts_must_be_worth_a_call_of_their_own() -> None:
    lengths, good, sure = DraftLengths(), [Candidate(1, 0.9)] * 4, [Candidate(4, 0.99)] * 4
    for _ in range(2):
        lengths.observe(4, 0, 1.0)
        lengths.observe(4, 4, 1.0)
        lengths.observe(4, 16, 1.2)
    assert lengths.choose(sure, 4, 300) == [0] * 4  # a step with prompts and without drafts is measured first
    for _ in range(2):
        lengths.observe(4, 0, 1.0, 300)
    assert lengths.choose(good, 4) == [1] * 4
    assert lengths.choose(good, 4, 300) == [0] * 4  # 1.9 tokens in 2 against 1 in 1
    assert lengths.choose(sure, 4, 300) == [4] * 4


def test_with_fixed_lengths_times_do_not_matter() -> None:
    lengths = DraftLengths(fixed=True)
    lengths.observe(1, 4, 1e9)
    assert lengths.choose([Candidate(4, 0.0), Candidate(0, 1.0)], 2) == [4, 0] and lengths.could_pay(2, 4)


def test_acceptance_counts_up_to_the_first_wrong_token() -> None:
    assert matched([1, 2, 3], [1, 2, 9, 9]) == 2 and matched([1, 2], [1]) == 1 and matched([], [1]) == 0
    a = Acceptance().of_sequence()
    for _ in range(200):
        a.observe(0, [1, 2, 3, 4], [1, 2, 3, 9])  # 3 of 4 tested
        a.observe(1, [1, 2, 3, 4], [9])
    assert a.rate(0) == pytest.approx(0.75, abs=0.01) and a.rate(1) < 0.01
    assert a.acceptance.of_sequence().rate(0) == pytest.approx(0.75, abs=0.02)  # a new one begins from the others
