"""Prompt lookup: the incremental index finds what a scan of the sequence finds."""

import random

import pytest

from jet_export.runtime.prompt_lookup import SIZES, WINDOW, Match, PromptLookup


def scan(tokens: list[int], most: int) -> Match:
    """The same by definition."""
    for n in SIZES:
        for at in range(len(tokens) - 1, n - 1, -1):
            if tokens[at - n : at] == tokens[-n:]:
                endless = tokens[at:] * (most + 1)
                return Match(endless[:most], n)
    return Match([], 0)


@pytest.mark.parametrize("seed", range(8))
def test_it_finds_what_a_scan_finds(seed: int) -> None:
    """Whatever part of the sequence is the prompt, with few tokens, so that n-grams of every size repeat."""
    rng = random.Random(seed)
    tokens = [rng.randrange(rng.choice([2, 3, 6, 150_000])) for _ in range(200)]
    prompt = rng.choice([1, 2, 7, 9, 100])
    index = PromptLookup(tokens[:prompt])
    for end in range(prompt, len(tokens)):
        assert index.propose(5) == scan(tokens[:end], 5)
        index.append(tokens[end])


def test_the_longest_match_comes_first_and_of_equal_ones_the_last() -> None:
    assert PromptLookup([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]).propose(2) == ([50, 9], 4)
    assert PromptLookup([3, 4, 50, 9, 3, 4, 60, 8, 3, 4]).propose(2) == ([60, 8], 2)


def test_a_draft_that_runs_into_the_end_repeats_itself() -> None:
    assert PromptLookup([7, 1, 2, 3, 1, 2, 3, 1, 2]).propose(7).tokens == [3, 1, 2, 3, 1, 2, 3]
    assert PromptLookup([5, 5, 5]).propose(4).tokens == [5, 5, 5, 5]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3]])
def test_without_a_match_there_is_no_draft(tokens: list[int]) -> None:
    assert PromptLookup(tokens).propose(4) == ([], 0)


def test_a_token_costs_no_more_behind_a_long_sequence() -> None:
    """By the operations it takes: a token adds one entry a size, and the index of a prompt is bounded."""
    index = PromptLookup(range(10 * WINDOW))
    assert len(index.tokens) == WINDOW
    before = sum(map(len, index.followed_by.values()))
    for i in range(100):
        index.append(i)
    assert sum(map(len, index.followed_by.values())) <= before + 100 * len(SIZES)
