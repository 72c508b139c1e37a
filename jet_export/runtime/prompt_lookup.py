"""Prompt lookup: drafts copied from where a sequence's last tokens came before, in its prompt or its answer.

An n-gram of the sequence points at the token that followed it last. The last tokens are looked up, the longest n-gram
first, and what followed there is the draft; where that runs into the end of the sequence it repeats itself, as in LZ77.
An n-gram is known by a 64-bit hash that rolls on with each token, so that a token costs a few dictionary operations
however long the sequence is. Two n-grams of one hash give a bad draft, which changes no answer.

Source: prompt lookup decoding (Saxena 2023), `prompt_lookup_num_tokens` in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SIZES = (8, 4, 2)  # tokens of the n-grams, the longest first
WINDOW = 1 << 14  # tokens of a prompt that are indexed, the last ones: their index takes some 5 MB
BASE, MODULUS = 0x9E3779B97F4A7C15, 1 << 64
FIRST = {n: pow(BASE, n - 1, MODULUS) for n in SIZES}  # weight of an n-gram's first token


class Match(NamedTuple):
    """A draft, and the size of the n-gram that it follows: the longer, the likelier."""

    tokens: list[int]
    size: int


NO_MATCH = Match([], 0)


class PromptLookup:
    """The n-grams of one sequence. Only the thread that takes the steps calls it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens[-WINDOW:])
        self.followed_by: dict[int, dict[int, int]] = {}  # size -> hash of an n-gram -> index of the token behind it
        self.last: dict[int, int] = {}  # size -> hash of the last n-gram
        array = np.asarray(self.tokens, dtype=np.uint64) + np.uint64(1)
        for n in SIZES:
            hashes = _hashes(array, n)
            self.followed_by[n] = dict(zip(hashes[:-1], range(n, len(self.tokens)), strict=True))
            self.last[n] = hashes[-1] if hashes else _hash(self.tokens)

    def append(self, token: int) -> None:
        tokens, end = self.tokens, len(self.tokens)
        for n in SIZES:
            before = self.last[n]
            if end >= n:
                self.followed_by[n][before] = end
                before -= FIRST[n] * (tokens[end - n] + 1)
            self.last[n] = (before * BASE + token + 1) % MODULUS
        tokens.append(token)

    def propose(self, most: int) -> Match:
        """Up to `most` tokens that may come next."""
        end = len(self.tokens)
        for n in SIZES:
            if end > n and (at := self.followed_by[n].get(self.last[n])) is not None:
                draft = self.tokens[at : at + most]
                period = end - at
                while len(draft) < most:
                    draft.append(draft[len(draft) - period])
                return Match(draft, n)
        return NO_MATCH


def _hashes(array: npt.NDArray[np.uint64], n: int) -> list[int]:
    """Of every n-gram, in order."""
    count = len(array) - n + 1
    if count < 1:
        return []
    total = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        total = total * np.uint64(BASE) + array[i : i + count]
    found: list[int] = total.tolist()
    return found


def _hash(tokens: Sequence[int]) -> int:
    total = 0
    for token in tokens:
        total = (total * BASE + token + 1) % MODULUS
    return total
