"""Drafts replayed from recorded answers, each token right with a stated probability: for measurements and tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jet_export.runtime.prompt_lookup import NO_MATCH, Match
from jet_export.runtime.sequence import RunningSequence

Asked = tuple[tuple[int, ...], int, int]  # prompt, seed, choice


MASK = 2**64 - 1
MOST = 16  # tokens of a draft


def hashed(seed: int, positions: int, drafted: int) -> npt.NDArray[np.uint64]:
    """[positions, drafted]: 64 bits that look random for each token of a draft at each position, by the last step of
    SplitMix64 (Steele et al., 2014)."""
    at = np.arange(positions, dtype=np.uint64)[:, None] * np.uint64(0xD1B54A32D192ED03)
    x = at + np.arange(drafted, dtype=np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
    x += np.uint64((seed * 0x9E3779B97F4A7C15 + 1) & MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return bits


def asked(sequence: RunningSequence) -> Asked:
    return tuple(sequence.prompt), sequence.params.sampling.seed, sequence.choice


class ReplayProposer:
    """Proposes what sequences answered when they were recorded.

    `acceptance`: the probability that a drafted token is right, whatever those before it are; a wrong one is a token
    a little further on in the vocabulary. Drafts depend on the request and the position only.
    """

    guesses = True

    def __init__(self, recorded: Sequence[RunningSequence], acceptance: float, vocab: int) -> None:
        self.answers: dict[Asked, list[int]] = {}
        self.running: dict[RunningSequence, list[list[int]]] = {}  # its drafts by position
        self.record(recorded)
        self.acceptance, self.vocab = acceptance, vocab

    def record(self, answered: Sequence[RunningSequence]) -> None:
        self.answers |= {asked(s): list(s.tokens) for s in answered}
        self.running.clear()

    def forget(self, sequence: RunningSequence) -> None:
        self.running.pop(sequence, None)

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        if (drafts := self.running.get(sequence)) is None:
            answer = self.answers.get(asked(sequence), [])
            drafts = self.running[sequence] = self._drafts(answer, sequence.params.sampling.seed)
        return Match(drafts[sequence.position][:most], 0) if sequence.position < len(drafts) else NO_MATCH

    def _drafts(self, answer: list[int], seed: int) -> list[list[int]]:
        """At each position, made at once: steps that are measured do not wait for them."""
        bits = hashed(seed, len(answer), MOST)
        tokens = np.asarray(answer + [0] * MOST, dtype=np.int64)[np.add.outer(np.arange(len(answer)), np.arange(MOST))]
        wrong = (tokens + 1 + (bits % np.uint64(7)).astype(np.int64)) % self.vocab
        right = bits < np.uint64(self.acceptance * MASK) if self.acceptance < 1 else True
        found: list[list[int]] = np.where(right, tokens, wrong).tolist()
        return [draft[: len(answer) - at] for at, draft in enumerate(found)]

    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: object) -> list[list[int]]:
        return [offer.tokens for offer in offers]
